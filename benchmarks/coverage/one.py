"""One model of the zoo, compiled into 2 and into 4 stages: `python one.py NAME` prints a JSON line.

The time counts from after the imports and covers building the model, both compilations and both
verifications. What is needed to judge the plans (the best possible stage cost, the size of the
graph) is computed afterwards, outside of it.
"""

import argparse
import json
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from importlib import import_module
from io import StringIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

import scpl_compile.api  # noqa: E402
from benchmarks.coverage.leaves import (  # noqa: E402
    Piece,
    best_max_us,
    item_costs,
    opaque_share,
    pieces_of,
)
from benchmarks.coverage.zoo import ZOO, Entry, config_of  # noqa: E402
from scpl_compile.capture import capture  # noqa: E402
from scpl_compile.cost import DEVICES  # noqa: E402
from scpl_compile.errors import ScplError  # noqa: E402
from scpl_compile.ir import Plan, Stage  # noqa: E402
from scpl_compile.methods.base import loss_us  # noqa: E402
from scpl_compile.sources import derive_inputs, load_model  # noqa: E402

__all__ = ["LIMIT", "NUM_STAGES", "Outcome", "Row", "answer", "as_json", "run_one", "without_paths"]

NUM_STAGES = (2, 4)
LIMIT = 1.25
"""A row counts if the costliest stage is at most this many times the best possible."""
_NOTABLE = 0.1
"""Of the whole cost: a module of less is not why a stage costs too much."""
_PATH = re.compile(r"(?:/[\w.+@~-]+)+/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one number of stages. stage_us: of every stage without its heads; trains: whether every
    stage holds parameters that train.
    """

    stage_us: tuple[float, ...]
    best_us: float
    verified: bool
    trains: bool

    @property
    def ratio(self) -> float:
        """Costliest stage over the best possible."""
        return max(self.stage_us) / self.best_us

    @property
    def counts(self) -> bool:
        """Whether the plan is verified, whole and balanced."""
        return self.verified and self.trains and self.ratio <= LIMIT


@dataclass(slots=True, kw_only=True)
class Row:
    """What is known about one model.

    seconds: with building; build_seconds: of building alone; cpu_seconds: of all threads together,
    which other work on the machine disturbs less.

    error_type: the class of the error; one that is no ScplError is a fault of the compiler.
    """

    family: str
    model: str
    config: str = ""
    inputs: str = ""
    batch: int = 0
    million_parameters: float = 0.0
    frontend: str = ""
    graph_nodes: int = 0
    opaque_share: float = 0.0
    opaque: str = ""
    outcomes: dict[int, Outcome]
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    build_seconds: float = 0.0
    error: str = ""
    error_type: str = ""


def run_one(entry: Entry, stages: Sequence[int] = NUM_STAGES) -> Row:
    """Compile `entry` into each of these numbers of stages; an error becomes part of the row."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    row = Row(family=entry.family, model=entry.name, outcomes={})
    config = config_of(entry)
    row.config = json.dumps(config, sort_keys=True) if config else ""
    plans: list[Plan] = []
    model: nn.Module | None = None
    _import_library(entry.spec, config)
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        with redirect_stderr(StringIO()):  # notices
            model, source = load_model(entry.spec, config=config)
            row.inputs = entry.inputs or ",".join(map(str, derive_inputs(model, source)))
            row.build_seconds = time.perf_counter() - start
            captures = scpl_compile.Captures()
            for num_stages in stages:
                plans.append(_verified_plan(model, row.inputs, num_stages, entry.batch, captures))
    except Exception as error:
        _note_error(row, error, f"{stages[len(plans)]} stages: " if plans else "")
    row.seconds = time.perf_counter() - start
    row.cpu_seconds = time.process_time() - cpu_start
    if model is not None:
        row.million_parameters = sum(p.numel() for p in model.parameters()) / 1e6
    if plans and model is not None:
        try:
            _judge(row, plans, model)
        except Exception as error:
            _note_error(row, error, "judging: ")
    return row


def _import_library(spec: str, config: dict[str, Any]) -> None:
    """Import what building the model would import, which is not counted."""
    library, _, name = spec.partition(":")
    if library == "torchvision":
        import_module("torchvision.models")
    elif library == "timm":
        import_module("timm")
    elif library == "hf":
        transformers = import_module("transformers")
        import_module("transformers.modeling_utils")
        config_class = type(transformers.CONFIG_MAPPING[name]())
        for head in ("SEQUENCE", "IMAGE", "AUDIO"):
            mapping = getattr(transformers, f"MODEL_FOR_{head}_CLASSIFICATION_MAPPING")
            try:
                mapping.get(config_class, None)
            except Exception:  # said again, and noted, when the model is built
                return


def _verified_plan(
    model: nn.Module,
    inputs: str,
    num_stages: int,
    batch_size: int,
    captures: scpl_compile.Captures,
) -> Plan:
    program = scpl_compile.api.compile_model(
        model, inputs, num_stages=num_stages, batch_size=batch_size or None, captures=captures
    )
    assert program.verification.is_verified, "compile_model verifies unless told otherwise"
    return program.plan


def _judge(row: Row, plans: Sequence[Plan], model: nn.Module) -> None:
    plan = plans[0]
    row.frontend = " ".join(dict.fromkeys(plan.frontend for plan in plans))
    row.batch = plan.batch_size
    row.opaque = "; ".join(f"{path}: {reason}" for path, reason in plan.opaque)
    graph = capture(model, plan.inputs, batch_size=plan.batch_size, frontend=plan.frontend)
    row.graph_nodes = len(graph.compute_nodes)
    pieces = pieces_of(model, plan.inputs, plan.batch_size)
    row.opaque_share = opaque_share(pieces, [path for path, _ in plan.opaque])
    items = item_costs(pieces)
    for plan in plans:
        outcome = _outcome(plan, model, items)
        row.outcomes[plan.num_stages] = outcome
        if not outcome.counts and not row.error:
            row.error, row.error_type = _unbalanced(plan, outcome, pieces, model), "Unbalanced"


def _outcome(plan: Plan, model: nn.Module, items: Sequence[float]) -> Outcome:
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    heads_us = [sum(loss_us(x, DEVICES["cpu"]) for x in stage.losses) for stage in plan.stages]
    return Outcome(
        stage_us=tuple(s.cost_us - us for s, us in zip(plan.stages, heads_us, strict=True)),
        best_us=best_max_us(items, plan.num_stages),
        verified=True,
        trains=all(not trained.isdisjoint(stage.parameters) for stage in plan.stages),
    )


def _unbalanced(plan: Plan, outcome: Outcome, pieces: Sequence[Piece], model: nn.Module) -> str:
    """Which stage costs too much, why, and what to do."""
    k = outcome.stage_us.index(max(outcome.stage_us))
    if not outcome.trains:
        return f"{plan.num_stages} stages: a stage holds no parameters that train; ask for fewer"
    nodes, cause = plan.stages[k].nodes, _cause(plan.stages[k], plan, pieces, model)
    return (
        f"{plan.num_stages} stages: stage {k} ({nodes[0]} .. {nodes[-1]}) costs "
        f"{outcome.ratio:.2f} times the best possible; {cause}"
    )


def _cause(stage: Stage, plan: Plan, pieces: Sequence[Piece], model: nn.Module) -> str:
    """What keeps together what is in a stage: a module called again, a tied parameter, or one that
    was kept whole; as a clause with the remedy.
    """
    calls = Counter(path for path, _ in {(p.path, p.call) for p in pieces if p.is_leaf})
    trained = {name for name in calls if any(True for _ in model.get_submodule(name).parameters())}
    again = [name for name in trained if calls[name] > 1 and _holds(stage, name)]
    tied = _tied_names(model, set(stage.parameters))
    whole = [item for item in plan.opaque if _holds(stage, item[0])]
    shares = {path: opaque_share(pieces, [path]) for path, _ in whole}
    path, reason = max(whole, key=lambda item: shares[item[0]], default=("", ""))
    if again:
        name = max(again, key=lambda name: opaque_share(pieces, [name]))
        return (
            f"{name!r} is called {calls[name]} times, which keeps what lies between in one stage: "
            "give every call a module of its own, or ask for fewer stages"
        )
    if tied:
        return (
            f"{' and '.join(tied)} are one parameter, which keeps what lies between in one stage: "
            "give each its own, or ask for fewer stages"
        )
    if shares.get(path, 0.0) > _NOTABLE:
        return (
            f"{path!r} was kept whole ({shares[path]:.0%} of the cost): {reason}; change that "
            "code, or ask for fewer stages"
        )
    return "no better place allows a cut: ask for fewer stages, or name places with --split-at"


def _holds(stage: Stage, path: str) -> bool:
    return any(f"{path}.".startswith(f"{n}.") or n.startswith(f"{path}.") for n in stage.nodes)


def _tied_names(model: nn.Module, owned: set[str]) -> tuple[str, ...]:
    """Two names of the first parameter in `owned` that has several."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (other := first.setdefault(id(parameter), name)) != name and other in owned:
            return other, name
    return ()


def without_paths(text: str) -> str:
    """`text` with file names in place of absolute paths."""
    return _PATH.sub("", text)


def _note_error(row: Row, error: Exception, where: str) -> None:
    kind = type(error).__name__
    text = " ".join(str(error).split())
    name = "" if isinstance(error, ScplError) else f"{kind}: "
    row.error = without_paths(f"{where}{name}{text}")
    row.error_type = kind if isinstance(error, ScplError) else f"unexpected {kind}"


def answer(name: str, stages: Sequence[int], threads: int, to: Connection) -> None:
    """Send the row of one model of the zoo as a JSON text; runs in a process of its own."""
    torch.set_num_threads(threads)
    to.send(as_json(run_one(ZOO[name], stages), stages))


def as_json(row: Row, stages: Sequence[int]) -> str:
    """A row with what follows from it; stages: that were asked for."""
    facts = asdict(row) | {"asked": len(stages)}
    for num_stages, outcome in row.outcomes.items():
        facts["outcomes"][num_stages] |= {"ratio": outcome.ratio, "counts": outcome.counts}
    return json.dumps(facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=ZOO, metavar="NAME", help="a name of zoo.py")
    parser.add_argument("--stages", type=int, nargs="+", default=NUM_STAGES)
    options = parser.parse_args()
    print(as_json(run_one(ZOO[options.name], options.stages), options.stages))


if __name__ == "__main__":
    main()
