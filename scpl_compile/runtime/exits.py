"""The weights of the heads that inference needs: exit-K.safetensors in a run.

They are local classifiers, or all heads of Associated Learning. The original model, whose names
final.safetensors has, knows nothing of them. On ranks each writes that of its stage.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from scpl_compile.errors import ProgramError
from scpl_compile.ir import Plan
from scpl_compile.runtime import checkpoint
from scpl_compile.runtime.inference import head_of
from scpl_compile.runtime.sharding import whole_tensor
from scpl_compile.runtime.stage_step import StageStep

__all__ = ["load_exits", "save_exits"]


def _file(directory: Path, stage: int) -> Path:
    return directory / f"exit-{stage}.safetensors"


def _exit_stages(plan: Plan) -> list[int]:
    return [int(text[:-1]) for text in plan.inference if not text.endswith("F")]


def _head(plan: Plan, stage: StageStep) -> nn.Module:
    head: nn.Module = getattr(stage.module, head_of(plan, stage.index).name)
    return head


def save_exits(
    directory: Path, plan: Plan, stages: Iterable[StageStep], *, writes: bool = True
) -> None:
    """Write the heads of those of `stages` that have an exit.

    writes: False for a replica that only has its share of a sharded stage to give.

    Raises:
        ProgramError: they cannot be written.
    """
    for stage in stages:
        if stage.index in _exit_stages(plan):
            with stage.lane.scope():
                state = _head(plan, stage).state_dict()
                tensors = {
                    name: whole_tensor(value.detach()).to("cpu", copy=True).contiguous()
                    for name, value in state.items()
                }
            if writes:
                _write(_file(directory, stage.index), tensors, plan.digest)


def _write(path: Path, tensors: Mapping[str, Tensor], digest: str) -> None:
    try:
        checkpoint.save_tensors(path, tensors, {"exit": json.dumps({"plan": digest})})
    except OSError as error:
        raise ProgramError(f"{path} cannot be written ({error}); make room and --resume") from error


def load_exits(directory: Path, plan: Plan, stages: Iterable[StageStep]) -> Path | None:
    """Fill the heads of `stages`; the first file that is missing, where one is: then nothing is.

    Raises:
        ProgramError: a file is damaged, or of another plan.
    """
    found = {stage: _file(directory, stage.index) for stage in stages
             if stage.index in _exit_stages(plan)}  # fmt: skip
    for path in found.values():
        if not path.is_file():
            return path
    for stage, path in found.items():
        tensors, metadata = checkpoint.load_tensors(path)
        if metadata.get("exit") != json.dumps({"plan": plan.digest}):
            raise ProgramError(f"{path} is of another plan; train this program again")
        try:
            _head(plan, stage).load_state_dict(tensors)
        except RuntimeError as error:
            text = " ".join(str(error).split())
            raise ProgramError(f"{path} is not of this program ({text})") from error
    return None
