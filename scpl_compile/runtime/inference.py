"""Inference in one process: the logits of every exit, or of the first exit that may be trusted.

::

    batch ─▶ stage 0 ─▶ exit 0 ─ trusted ─▶ logits
                └─ the other samples ─▶ stage 1 ─▶ exit 1 ─ trusted ─▶ logits
                                           └─ the others ─▶ …

A sample that has left costs nothing from there on: later stages get the other rows only.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scpl_compile.errors import MethodError
from scpl_compile.ir import MULTI_LABEL, LocalLoss, Plan
from scpl_compile.runtime.evaluation import Tally
from scpl_compile.runtime.stage import as_tuple
from scpl_compile.runtime.stage_step import StageStep

__all__ = ["EarlyExits", "ExitRule", "Inference", "bridged", "decoded", "head_of", "local_exit"]

_CODE = "code of the labels"

Values = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class ExitRule:
    """When a sample leaves.

    confidence:P   the largest probability is P or more (0 < P <= 1)
    agreement:N    the last N exits give the same class (N >= 2)

    Of task multi-label: every label is there, or not there, with probability P; the last N exits
    give the same labels.
    """

    kind: str
    limit: float
    is_multi_label: bool = False

    @classmethod
    def of(cls, plan: Plan, text: str) -> "ExitRule":
        """The rule `text` for a program.

        Raises:
            MethodError: `text` is no rule, or the program has too few exits for it.
        """
        rule = replace(cls.parse(text), is_multi_label=plan.task == MULTI_LABEL)
        num_early = sum(step.endswith("X") for step in plan.inference)
        if not num_early:
            why = "one stage" if plan.num_stages == 1 else f"method {plan.method!r}"
            raise MethodError(
                f"a program of {why} has one exit, so no rule {text!r} of leaving early; methods "
                "early_exit, dascpl and deinforeg have one for each of several stages"
            )
        if rule.kind == "agreement" and rule.limit > num_early:
            raise MethodError(
                f"exit rule {text!r} asks for {rule.limit:.0f} exits before the last one, and this "
                f"program has {num_early}; compile with --stages {rule.limit + 1:.0f} or more, or "
                "use confidence:P"
            )
        for cut in plan.cuts:
            for crossing in cut.crossings:
                if crossing.meta.batch_dim is None:
                    raise MethodError(
                        f"{crossing.name!r} crosses cut {cut.index} and has no batch dimension, so "
                        "no sample can leave before it; cut elsewhere with --split-at"
                    )
        return rule

    @classmethod
    def parse(cls, text: str) -> "ExitRule":
        """Raises MethodError where `text` is no such rule."""
        kind, _, number = text.partition(":")
        try:
            limit = float(number)
        except ValueError:
            limit = -1.0
        fits = {"confidence": 0 < limit <= 1, "agreement": limit >= 2 and limit.is_integer()}
        if not fits.get(kind, False):
            raise MethodError(
                f"exit rule {text!r} is not one of confidence:P, as in confidence:0.9, and "
                "agreement:N, as in agreement:2"
            )
        return cls(kind, limit)

    def said(self, logits: Tensor) -> Tensor:
        """What an exit says: (B, 1), the class, or (B, C), whether each label is there."""
        return (logits > 0).long() if self.is_multi_label else logits.argmax(-1, keepdim=True)

    def trusts(self, logits: Tensor, said: Tensor) -> Tensor:
        """(B,) bool. logits: (B, C) of the newest exit; said: by each exit, (exits, B, …)."""
        if self.kind == "confidence" and self.is_multi_label:
            return logits.float().abs().sigmoid().amin(-1) >= self.limit
        if self.kind == "confidence":
            return logits.float().softmax(-1).amax(-1) >= self.limit
        last = int(self.limit)
        if len(said) < last:
            return torch.zeros(len(logits), dtype=torch.bool)
        return (said[-last:] == said[-1]).all(-1).all(0)


@dataclass(frozen=True, slots=True)
class EarlyExits:
    """logits: (B, C), of the exit that each sample left by; exits: (B,) its number; on the CPU."""

    logits: Tensor
    exits: Tensor


def local_exit(plan: Plan, stage: StageStep, values: Mapping[str, Tensor]) -> Tensor:
    """The logits of a stage's local classifier."""
    loss = head_of(plan, stage.index)
    names = (*loss.reads, loss.mask) if loss.mask else loss.reads
    with stage.autocast():
        logits: Tensor = stage.module.exit(*(values[name] for name in names))  # type: ignore[operator]
    return logits


def bridged(plan: Plan, stage: StageStep, values: Mapping[str, Tensor]) -> Tensor:
    """Associated Learning: the code that the last stage's features stand for, float32 at least."""
    loss = head_of(plan, stage.index)
    reads = [values[name] for name in loss.reads]
    mask = values[loss.mask] if loss.mask else None
    with stage.autocast():
        code: Tensor = getattr(stage.module, loss.name).associate(*reads, mask=mask)
    return code.to(torch.promote_types(code.dtype, torch.float32))


def decoded(plan: Plan, stage: StageStep, code: Tensor) -> Tensor:
    """Associated Learning: the code of the stage before; from the first stage (B, num_classes)."""
    with stage.autocast():
        source: Tensor = getattr(stage.module, head_of(plan, stage.index).name).decode(code)
    return source.to(torch.promote_types(source.dtype, torch.float32))


def head_of(plan: Plan, stage: int) -> LocalLoss:
    """The stage's loss with a head."""
    return next(loss for loss in plan.stages[stage].losses if loss.has_head)


class Inference:
    """The inference steps of a plan, over stages that are all in this process.

    num_active: how many of them take part; the exit of the last is the output.
    """

    def __init__(
        self, plan: Plan, stages: Sequence[StageStep], num_active: int | None = None
    ) -> None:
        self._plan = plan
        self._stages = stages
        self._num_active = plan.num_stages if num_active is None else num_active

    def all_exits(self, values: Values) -> list[Tensor]:
        """The logits of every exit, the model's own last."""
        exits = []
        for k, kind in self._steps():
            if kind == "F":
                values = self._forward(k, values)
            elif kind == "X":
                exits.append(local_exit(self._plan, self._stages[k], values))
            else:
                values = self._back(k, kind, values)
        if self._num_active == self._plan.num_stages:
            exits.append(values[self._plan.outputs[0]])
        return exits

    def _back(self, k: int, kind: str, values: Values) -> Values:
        """The last bridge ("B") gives a code, each decoder ("D") leads it back; the first one's is
        the output.
        """
        stage = self._stages[k]
        if kind == "B":
            code = bridged(self._plan, stage, values)
        else:
            received = stage.lane.receive({_CODE: values[_CODE]}, None)
            code = decoded(self._plan, stage, received[_CODE])
        return values | {_CODE if kind == "B" or k else self._plan.outputs[0]: code}

    def early(self, values: Values, rule: ExitRule) -> EarlyExits:
        """The logits of the first exit that `rule` trusts, sample by sample."""
        if self._num_active < self._plan.num_stages:
            raise MethodError(
                f"samples leave early when all {self._plan.num_stages} stages take part; "
                f"{self._num_active} do so far"
            )
        given = next(iter(values.values()))
        rows = torch.arange(len(given))  # of the batch, still on their way
        said: list[Tensor] = []
        exits = torch.zeros(len(rows), dtype=torch.int64)
        left: list[tuple[Tensor, Tensor]] = []
        for k, kind in self._steps():
            if kind == "F":
                values = self._forward(k, values)
                continue
            logits = local_exit(self._plan, self._stages[k], values).cpu()
            said.append(rule.said(logits))
            done = rule.trusts(logits, torch.stack(said))
            left.append((rows[done], logits[done]))
            exits[rows[done]] = len(said) - 1
            rows, said = rows[~done], [each[~done] for each in said]
            if not len(rows):
                break
            if done.any():
                values = self._selected(k, values, ~done)
        else:
            left.append((rows, values[self._plan.outputs[0]].cpu()))
            exits[rows] = len(said)
        order = torch.cat([numbers for numbers, _ in left]).argsort()
        return EarlyExits(torch.cat([logits for _, logits in left])[order], exits)

    def costs(self, values: Values) -> list[float]:
        """Forward FLOPs of one sample that leaves by each exit, over those of the model alone.

        Counted on a batch, which runs through: matrix products and convolutions, as in
        torch.utils.flop_counter; that knows no recurrent layers: with one of them nothing is told.
        """
        modules = [module for stage in self._stages for module in stage.module.modules()]
        if any(isinstance(module, nn.RNNBase) for module in modules):
            return []
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # one operation, which counts as nothing
        try:
            return self._counted(values)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def _counted(self, values: Values) -> list[float]:
        total, model, found = 0, 0, []
        for k, kind in self._steps():
            with FlopCounterMode(display=False) as counter:
                if kind == "F":
                    values = self._forward(k, values)
                else:
                    local_exit(self._plan, self._stages[k], values)
            total += counter.get_total_flops()
            model += counter.get_total_flops() if kind == "F" else 0
            if kind != "F":
                found.append(total)
        return [flops / max(model, 1) for flops in (*found, total)]

    def add_to(self, tally: Tally, values: Values, labels: Tensor, rule: ExitRule | None) -> None:
        """Count one batch; rule: its samples leave early."""
        if rule is None:
            tally.add(self.all_exits(values), labels)
            return
        tally.costs = tally.costs or self.costs(values)
        found = self.early(values, rule)
        tally.add([found.logits], labels)
        tally.add_exits(found.exits, 1 + sum(kind == "X" for _, kind in self._steps()))

    def _steps(self) -> Iterator[tuple[int, str]]:
        for text in self._plan.inference:
            if int(text[:-1]) < self._num_active:
                yield int(text[:-1]), text[-1]

    def _forward(self, k: int, values: Values) -> Values:
        stage, spec = self._stages[k], self._plan.stages[k]
        values = stage.options.arrange(stage.lane.receive(values, None))
        with stage.autocast():
            outputs = as_tuple(stage.module(*(values[name] for name in spec.inputs)))
        return values | dict(zip(spec.outputs, outputs, strict=True))

    def _selected(self, k: int, values: Values, rows: Tensor) -> Values:
        """Some rows of what crosses the cut after stage k."""
        found = {}
        for crossing in self._plan.cuts[k].crossings:
            value, dim = values[crossing.name], crossing.meta.batch_dim
            assert dim is not None, "ExitRule.of has looked"
            found[crossing.name] = value.index_select(dim, rows.nonzero()[:, 0].to(value.device))
        return found
