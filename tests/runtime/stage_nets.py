"""Models with hand-written stages and hand-made plans: what an emitted program would contain."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scpl_compile.ir import Crossing, Cut, InputSpec, LocalLoss, Plan, Stage, TensorMeta
from scpl_compile.runtime.engine import Engine
from scpl_compile.runtime.lane import Lane
from scpl_compile.runtime.optim import make_optimizer
from scpl_compile.runtime.randomness import StageRandom, seeded
from scpl_compile.runtime.stage import cut, take
from scpl_compile.runtime.stage_step import StageStep
from scpl_compile.runtime.trainer import StageClass, Trainer

WIDTH, NUM_CLASSES, BATCH_SIZE = 8, 4, 6
CPU = torch.device("cpu")
SECONDS = 20.0
"""How long a test waits for what must happen; reached only where it fails."""
Batch = tuple[Tensor, Tensor]

# ---------------------------------------------------------------------- a model of K blocks


class Block(nn.Module):
    """(B, WIDTH) to (B, WIDTH), with all that a step may change or draw.

    Weights, batch norm's buffers, dropout, and a running mean that no file of weights has.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(F.relu(self.norm(self.linear(x - self.mean))))
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.1)
        return y


class Net(nn.Module):
    """`num_blocks` blocks and a classifier: (B, WIDTH) to (B, NUM_CLASSES)."""

    def __init__(self, num_blocks: int, dropout: float = 0.3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(num_blocks))
        self.out = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.out(x)
        return logits


class BlockStage(nn.Module):
    """Block `index` of a Net; all but the last train on a linear classifier of their own."""

    def __init__(self, model: Net, index: int) -> None:
        super().__init__()
        self.index = index
        self.is_last = index == len(model.blocks) - 1
        take(self, model, f"blocks.{index}", *(["out"] if self.is_last else []))
        if not self.is_last:
            self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks[self.index](x)
        return self.out(y) if self.is_last else y

    def training_step(self, x: Tensor, *, labels: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        y = self(x)
        if self.is_last:
            return (), {"cross_entropy": F.cross_entropy(y, labels)}
        return (cut(y),), {"local": F.cross_entropy(self.head(y), labels)}

    def exit(self, y: Tensor) -> Tensor:
        return self.head(y)


class Spoiled(BlockStage):
    """Its loss is not a number at its fourth batch."""

    def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
        self.calls = getattr(self, "calls", -1) + 1
        sent, losses = super().training_step(x, labels=labels)
        factor = float("nan") if self.calls == 3 else 1.0
        return sent, {name: loss * factor for name, loss in losses.items()}


class Fails(BlockStage):
    """Fails at its third batch."""

    def training_step(self, x: Tensor, *, labels: Tensor) -> Any:
        self.calls = getattr(self, "calls", -1) + 1
        if self.calls == 2:
            raise ValueError("no such number")
        return super().training_step(x, labels=labels)


def block_stages(num_stages: int, **others: Callable[[Net, int], nn.Module]) -> list[StageClass]:
    """The stage classes of a Net; `stage1=Slow` takes another class for stage 1."""
    return [
        partial(others.get(f"stage{k}", BlockStage), index=k)  # type: ignore[call-arg]
        for k in range(num_stages)
    ]


def build_net(num_stages: int, dropout: float = 0.3, seed: int = 11) -> Net:
    """The same weights for the same seed, whatever was drawn before."""
    with seeded(seed):
        return Net(num_stages, dropout)


def batches(num_batches: int, *, views: int = 1, seed: int = 5) -> list[Batch]:
    """Inputs (views * BATCH_SIZE, WIDTH) float32 and labels (BATCH_SIZE,) int64 of all
    classes."""
    draws = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(views * BATCH_SIZE, WIDTH, generator=draws),
            torch.randperm(BATCH_SIZE, generator=draws) % NUM_CLASSES,
        )
        for _ in range(num_batches)
    ]


# ---------------------------------------------------------------------- plans


def make_plan(
    reads: Sequence[tuple[str, ...]],
    *,
    model: nn.Module | None = None,
    inputs: tuple[InputSpec, ...] = (InputSpec(name="x", dtype="float32", shape=(WIDTH,)),),
    paths: Sequence[tuple[str, ...]] = (),
    schedule: str = "stream",
    inference: tuple[str, ...] | None = None,
    losses: Sequence[tuple[LocalLoss, ...]] = (),
) -> Plan:
    """A plan whose stage k reads the tensors reads[k]; what stage k + 1 reads crosses cut k.

    paths[k]: the modules of `model` that stage k takes.
    """
    num_stages = len(reads)
    meta = TensorMeta(shape=(2, WIDTH), dtype="float32", requires_grad=True, batch_dim=0)
    named = [] if model is None else [name for name, _ in model.named_buffers()]
    stages = tuple(
        Stage(
            index=k,
            nodes=(f"block{k}",),
            parameters=(),
            buffers=tuple(
                name for name in named for path in (paths[k] if paths else ())
                if name == path or name.startswith(f"{path}.")
            ),
            inputs=reads[k],
            outputs=reads[k + 1] if k + 1 < num_stages else ("logits",),
            losses=losses[k] if losses else (),
            num_parameters=0,
            cost_us=1.0,
        )
        for k in range(num_stages)
    )  # fmt: skip
    cuts = tuple(
        Cut(
            index=k,
            after=f"block{k}",
            crossings=tuple(
                Crossing(name=name, meta=meta, producer=k, consumers=(k + 1,))
                for name in reads[k + 1]
            ),
            detach=schedule != "bp",
        )
        for k in range(num_stages - 1)
    )
    return Plan(
        method="bp" if schedule == "bp" else "scpl",
        model="net.py:build",
        stages=stages,
        cuts=cuts,
        edges=tuple((k, k + 1) for k in range(num_stages - 1)),
        inputs=inputs,
        batch_size=BATCH_SIZE,
        outputs=("logits",),
        num_classes=NUM_CLASSES,
        schedule=schedule,
        placement=("cpu",) * num_stages,
        num_microbatches=1,
        threads_per_stage=1,
        optimizer={"name": "adam"},
        inference=inference or tuple(f"{k}F" for k in range(num_stages)),
        untrained=(),
        frontend="hand",
        opaque=(),
        solver="hand",
        bottleneck_us=1.0,
        lower_bound_us=1.0,
        source=None,
        versions={},
    )


def block_plan(num_stages: int, **changes: Any) -> Plan:
    """The plan of a Net: x, then h1, h2, … cross."""
    reads = [("x",), *((f"h{k}",) for k in range(1, num_stages))]
    paths = [(f"blocks.{k}",) for k in range(num_stages)]
    return make_plan(reads, model=build_net(num_stages), paths=paths, **changes)


def make_trainer(
    num_stages: int = 2, *, stages: Sequence[StageClass] | None = None, **options: Any
) -> Trainer:
    """A trainer of a Net; the same seed gives the same weights and draws."""
    options = {"lr": 1e-2, **options}
    return Trainer(
        options.pop("plan", None) or block_plan(num_stages),
        options.pop("model", None) or build_net(num_stages),
        stages or block_stages(num_stages),
        **options,
    )


# ---------------------------------------------------------------------- without a trainer


def stage_steps(
    num_stages: int = 2,
    *,
    stages: Sequence[StageClass] | None = None,
    optimizer: str = "adam",
    seed: int = 0,
    dropout: float = 0.3,
    **options: Any,
) -> list[StageStep]:
    """The stage steps of a Net; options: those of StageStep. With draws=False set dropout to 0."""
    model = build_net(num_stages, dropout)
    steps = []
    for k, make in enumerate(stages or block_stages(num_stages)):
        with seeded(100 * seed + k):
            module = make(model)
        given = {"detach": True, "lane": Lane(CPU), "learning_rate": lambda step: 1e-2, **options}
        steps.append(
            StageStep(
                k,
                module.train(),
                inputs=("x",) if k == 0 else (f"h{k}",),
                sends=(f"h{k + 1}",) if k + 1 < num_stages else (),
                optimizer=make_optimizer(optimizer, module.parameters(), 1e-2, {}),
                random=StageRandom(100 * seed + 50 + k, CPU),
                **given,
            )
        )
    return steps


def step_of(module: nn.Module, **options: Any) -> StageStep:
    """A single stage that reads x and sends nothing."""
    given = {
        "inputs": ("x",), "sends": (), "lane": Lane(CPU), "optimizer": None,
        "learning_rate": lambda step: 0.1, "random": StageRandom(0, CPU), "detach": True,
    }  # fmt: skip
    return StageStep(0, module, **{**given, **options})


def run_stage(stage: StageStep, steps: Mapping[int, tuple[Tensor, Tensor]]) -> None:
    for step, (x, labels) in steps.items():
        stage.receive(step, {stage.inputs[0]: x}, labels, None)
        stage.forward(step)
        stage.backward(step)
        stage.update(step)


class LossStage(nn.Module):
    """Its loss at each call is what it was told."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = iter(values)
        self.weight = nn.Parameter(torch.ones(()))

    def training_step(self, x: Tensor, *, labels: Tensor) -> tuple[Any, dict[str, Tensor]]:
        return (), {"a": self.weight * next(self.values), "b": self.weight * 2}


def module_with_step(module: nn.Module) -> nn.Module:
    module.training_step = lambda x, *, labels: ((), {})
    return module


class SilentSgd(torch.optim.Optimizer):
    """SGD whose writes autograd does not notice; else torch itself refuses some planted faults."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.data.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])


# ---------------------------------------------------------------------- training, comparing


def state_of(stages: Sequence[StageStep]) -> dict[str, object]:
    """All that the stages own: bytes and JSON values by name. Drain first."""
    found: dict[str, object] = {}
    for stage in stages:
        tensors, values = stage.state()
        for name, tensor in tensors.items():
            found[f"{stage.index} {name}"] = tensor.numpy().tobytes()
        found |= {f"{stage.index} {name}": value for name, value in values.items()}
    return found


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """The names at which two states differ in a bit."""
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def submit_steps(engine: Engine, num_steps: int, first: int = 0) -> None:
    """Give the first batches to the engine, those before `first` left out."""
    for x, labels in batches(num_steps)[first:]:
        engine.submit({"x": x}, labels)


def train_steps(
    num_stages: int, schedule: str, num_steps: int = 20, **options: Any
) -> tuple[dict[str, object], Engine]:
    """All that the stages own after training, and the closed engine."""
    steps = options.pop("steps", None) or stage_steps(num_stages)
    engine = Engine(steps, schedule=schedule, **{"threads_per_stage": 1, **options})
    try:
        submit_steps(engine, num_steps)
        engine.drain()
    finally:
        engine.close()
    losses = {f"{stage.index} losses": stage.take_losses() for stage in steps}
    return {**state_of(steps), **losses}, engine


def submit_all(trainer: Trainer, data: list[Batch]) -> None:
    """Train on these batches."""
    for x, labels in data:
        trainer.step(x, labels)


def outcome(trainer: Trainer) -> dict[str, object]:
    """All that the stages own, and the losses of every step since they were last taken."""
    trainer.drain()
    losses = {f"{k} losses": rows for k, rows in enumerate(trainer.take_losses())}
    return {**state_of(trainer._stages), **losses}


def train(num_steps: int, num_stages: int = 2, **options: Any) -> dict[str, object]:
    """The outcome of a trainer of its own."""
    with make_trainer(num_stages, **options) as trainer:
        submit_all(trainer, batches(num_steps))
        return outcome(trainer)
