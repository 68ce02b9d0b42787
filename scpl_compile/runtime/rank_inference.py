"""Inference over ranks: every rank runs its stages in order and hands on what crosses."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch import Tensor

from scpl_compile.ir import Plan
from scpl_compile.runtime.inference import bridged, decoded, head_of, local_exit
from scpl_compile.runtime.rank_engine import LABELS, batch_key
from scpl_compile.runtime.ranks import Ranks
from scpl_compile.runtime.sharding import Sharded
from scpl_compile.runtime.stage import as_tuple, evaluating
from scpl_compile.runtime.stage_step import StageStep
from scpl_compile.runtime.wire import Inbox, Outbox

__all__ = ["RankInference", "crossing_names"]


class RankInference:
    """The share of this rank in the inference of a plan.

    sharded: by index, the stages that are split over replicas.
    """

    def __init__(
        self,
        plan: Plan,
        stages: Sequence[StageStep],
        ranks: Ranks,
        sharded: Mapping[int, Sharded],
    ) -> None:
        self.exit_stages = _exit_stages(plan)
        self._plan = plan
        self._stages = sorted(stages, key=lambda stage: stage.index)
        self._ranks = ranks
        self._sharded = sharded
        own = set(ranks.stages)
        last = plan.num_stages - 1
        self._goes_back = "0D" in plan.inference
        names = {k: _forward_names(plan, k) for k in range(last)}
        self._inboxes = {
            k: Inbox(ranks.rank_of(k - 1), names[k - 1], ranks.device)
            for k in own
            if k > 0 and k - 1 not in own
        }
        self._outboxes = {
            k: Outbox(ranks.rank_of(k + 1), names[k], ranks.device, self._inboxes.get(k))
            for k in own
            if k < last and k + 1 not in own
        }

    @torch.no_grad()
    def run(
        self, values: dict[str, Tensor], labels: Tensor, num_active: int
    ) -> tuple[dict[int, Tensor], Tensor]:
        """The logits of this rank's exits, by their number, and the batch's labels.

        num_active: how many stages take part; the others give no exit. Every rank
        calls it with a batch of the same shapes; the values are used where stage 0 is.
        """
        key = ("inference", *batch_key(values, labels))
        found: dict[int, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(evaluating([stage.module for stage in self._stages]))
            for sharded in self._sharded.values():
                stack.enter_context(sharded.gathered())
            for stage in self._stages:
                k, spec = stage.index, self._plan.stages[stage.index]
                if k >= num_active:
                    break
                with stage.lane.scope():
                    if (inbox := self._inboxes.get(k)) is not None:
                        inbox.post(key)
                        values = inbox.take()
                        labels = values.pop(LABELS)
                    values = stage.options.arrange(stage.lane.receive(values, None))
                    with stage.autocast():
                        given = stage.module(*(values[name] for name in spec.inputs))
                    values |= dict(zip(spec.outputs, as_tuple(given), strict=True))
                    if not self._goes_back:
                        found |= self._exits(stage, values)
                    outbox = self._outboxes.get(k)
                    if outbox is not None and k + 1 < num_active:
                        outbox.send(key, {**values, LABELS: labels.to(stage.lane.device)})
            if self._goes_back:
                found = self._back(values, len(labels))
        return found, labels

    def _back(self, values: Mapping[str, Tensor], batch_size: int) -> dict[int, Tensor]:
        """Associated Learning: from the last bridge back through the decoders of all ranks."""
        code: Tensor | None = None
        for stage in reversed(self._stages):
            k = stage.index
            with stage.lane.scope():
                if k == self._plan.num_stages - 1:
                    code = bridged(self._plan, stage, values)
                elif code is None:
                    width = int(head_of(self._plan, k).options["latent"])
                    code = torch.empty(batch_size, width, device=stage.lane.device)
                    dist.recv(code, self._ranks.rank_of(k + 1))
                code = decoded(self._plan, stage, code)
                if k and self._ranks.rank_of(k - 1) != self._ranks.rank:
                    dist.send(code.contiguous(), self._ranks.rank_of(k - 1))
                    code = None
        return {} if code is None else {0: code}

    def _exits(self, stage: StageStep, values: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Those of one stage: its local classifier, and the model's own logits from the last."""
        last = len(self.exit_stages) - 1
        return {
            i: values[self._plan.outputs[0]] if i == last else local_exit(self._plan, stage, values)
            for i, k in enumerate(self.exit_stages)
            if k == stage.index
        }

    def shared(self, found: Mapping[int, Tensor], num_active: int) -> list[Tensor]:
        """The logits of these stages' exits, float32 on the CPU, on every rank of the replica."""
        exits = []
        for i, stage in enumerate(self.exit_stages):
            if stage >= num_active:
                break
            logits = found[i].float().cpu().contiguous() if i in found else torch.empty(0, 0)
            source, group = self._ranks.rank_of(stage), self._ranks.stage_group
            shape = torch.tensor(logits.shape)
            dist.broadcast(shape, source, group=group)
            if i not in found:
                logits = torch.empty(*shape.tolist(), dtype=torch.float32)
            dist.broadcast(logits, source, group=group)
            exits.append(logits)
        return exits


def crossing_names(plan: Plan, cut: int) -> tuple[str, ...]:
    """Names of what may cross `cut`, labels among them; none outside of the model."""
    if not 0 <= cut < len(plan.cuts):
        return ()
    return (*plan.sent(cut), LABELS)


def _forward_names(plan: Plan, cut: int) -> tuple[str, ...]:
    """Of these, those that forward reads: no codes of the labels."""
    inputs = plan.stages[cut + 1].inputs
    return (*(name for name in plan.sent(cut) if name in inputs), LABELS)


def _exit_stages(plan: Plan) -> tuple[int, ...]:
    """The stage of every exit, in the order in which Trainer.predict gives them."""
    early = [int(text[:-1]) for text in plan.inference if text.endswith("X")]
    return (*early, 0 if "0D" in plan.inference else plan.num_stages - 1)
