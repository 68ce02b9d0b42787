"""The weights of the heads that inference needs: exit-K.safetensors in a run.

They are local classifiers, or all heads of Associated Learning. The original model, whose names
final.safetensors has, knows nothing of them. On ranks each writes that of its stage. A file tells
after which step it was written, so that one is never taken with weights of another step.
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
    directory: Path, plan: Plan, stages: Iterable[StageStep], steps: int, *, writes: bool = True
) -> None:
    """Write the heads of those of `stages` that have an exit, after so many steps.

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
                facts = {"plan": plan.digest, "steps": steps}
                _write(_file(directory, stage.index), tensors, facts)


def _write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
    try:  # one key: the order of several is not kept in the file
        checkpoint.save_tensors(path, tensors, {"exit": json.dumps(facts)})
    except OSError as error:
        raise ProgramError(f"{path} cannot be written ({error}); make room and --resume") from error


def load_exits(
    directory: Path, plan: Plan, stages: Iterable[StageStep], steps: int | None = None
) -> Path | None:
    """Fill the heads of `stages`; the first file that is missing, where one is: then nothing is.

    steps: after how many the weights of the model beside them were written; None: not known, then
    the files must agree with each other.

    Raises:
        ProgramError: a file is damaged, or of another plan or step; no head is filled.
    """
    found = {stage: _file(directory, stage.index) for stage in stages
             if stage.index in _exit_stages(plan)}  # fmt: skip
    for path in found.values():
        if not path.is_file():
            return path
    read: dict[StageStep, dict[str, Tensor]] = {}
    for stage, path in found.items():
        read[stage], metadata = checkpoint.load_tensors(path)
        own = _steps(path, metadata, plan.digest)
        steps = own if steps is None else steps
        if own != steps:
            raise ProgramError(
                f"{path} was written after {own} steps and the weights beside it after {steps}, so "
                "they do not belong together; go on with the run by --resume, or train it again"
            )
    for stage, path in found.items():
        try:
            _head(plan, stage).load_state_dict(read[stage])
        except RuntimeError as error:
            text = " ".join(str(error).split())
            raise ProgramError(f"{path} is not of this program ({text})") from error
    return None


def _steps(path: Path, metadata: Mapping[str, str], digest: str) -> int:
    try:
        facts = json.loads(metadata.get("exit", ""))
        if facts["plan"] == digest:
            return int(facts["steps"])
    except (ValueError, KeyError, TypeError):
        pass
    raise ProgramError(f"{path} is of another plan; train this program again")
