"""The trainer of one rank: the same calls, each made by every rank."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scpl_compile.actions import Action
from scpl_compile.errors import DataError
from scpl_compile.ir import Plan
from scpl_compile.runtime.batch import Inputs, check_labels, named_inputs
from scpl_compile.runtime.engine import StageEngine
from scpl_compile.runtime.evaluation import Evaluation, Tally
from scpl_compile.runtime.lane import Lane
from scpl_compile.runtime.own_stage import keep_stage
from scpl_compile.runtime.randomness import StageRandom, spread_seed
from scpl_compile.runtime.rank_engine import LABELS, RankEngine, batch_key
from scpl_compile.runtime.ranks import Ranks
from scpl_compile.runtime.replicas import averaged, contrast_globally
from scpl_compile.runtime.stage import as_tuple, evaluating
from scpl_compile.runtime.trainer import StageClass, Trainer

__all__ = ["RankTrainer"]


class RankTrainer(Trainer):
    """Trains the stage of this rank; see Trainer for the calls.

    Every rank makes every call, with batches of the same shapes: of the inputs only rank 0's values
    are used (others may pass tensors on the meta device), labels travel with their batch. Losses
    and the gathered state_dict are rank 0's; elsewhere losses are empty and state_dict has the own
    stage alone.

    Args:
        ranks: this rank's place.
        names: of the model's parameters and buffers, by id. read: their first values by name.
        contrast: "local", over the replica's own share of the batch, or "global", over all.
        options: those of Trainer; devices are told by `ranks`.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        stages: Sequence[StageClass],
        *,
        ranks: Ranks,
        names: Mapping[int, str],
        read: Callable[[Iterable[str]], dict[str, Tensor]],
        contrast: str = "local",
        **options: Any,
    ) -> None:
        self._ranks = ranks
        self._names = names
        self._read = read
        self._contrast = contrast
        self._mail_lock = threading.Lock()  # the writer of checkpoints takes losses too
        self._num_sent = 0
        self._num_received = [0] * plan.num_stages
        self._num_saves = 0
        threads: int = options.get("threads_per_stage") or plan.threads_per_stage
        torch.set_num_threads(threads)
        super().__init__(plan, model, stages, **options)
        self._stage = self._stages[0]

    # ------------------------------------------------------------------ what is made

    def _resolve_devices(self, names: tuple[str, ...]) -> tuple[torch.device, ...]:
        ranks = self._ranks
        ranks.post(f"device/{ranks.rank}", str(ranks.device))
        row = range(self.plan.num_stages)
        return tuple(torch.device(ranks.wait_for(f"device/{ranks.rank_of(k)}")) for k in row)

    def _own_stages(self) -> Sequence[int]:
        return (self._ranks.stage,)

    def _take(self, stage: int, make: StageClass, lane: Lane) -> nn.Module:
        module = self._make(stage, make)
        tensors = (*module.parameters(), *module.buffers())
        own = [self._names[id(tensor)] for tensor in tensors if id(tensor) in self._names]
        keep_stage(self.model, module, self._names, self._read(own))
        contrast_globally(module, self._contrast, self._ranks.replica_group)
        return module.to(lane.device)

    def _stage_seed(self, stage: int) -> int:
        """Every replica draws its own masks; the first those of a run without replicas."""
        seed, replica = super()._stage_seed(stage), self._ranks.replica
        return spread_seed(seed, replica) if replica else seed

    def _training_step(self, module: nn.Module) -> Callable[..., Any]:
        if self._ranks.num_replicas == 1:
            return super()._training_step(module)
        leaves_some = bool(self.plan.untrained)
        return averaged(module, self._ranks.replica_group, leaves_some=leaves_some)

    def _start_engine(
        self, first_step: int, actions: Sequence[Iterator[Action]] | None = None
    ) -> StageEngine:
        k = self._ranks.stage
        self._rank_engine = RankEngine(
            self._stages[0],
            self._ranks,
            schedule=self.schedule,
            crossings=(_crossings(self.plan, k - 1), _crossings(self.plan, k)),
            first_step=first_step,
            record_events=self._record_events,
        )
        return self._rank_engine

    # ------------------------------------------------------------------ training

    def drain(self) -> None:
        """Wait until every rank has finished every submitted step, and has told its losses."""
        self._rank_engine.finish()
        if self._ranks.rank != 0:
            self.take_losses()
        super().drain()

    def take_losses(self) -> list[list[tuple[int, dict[str, float]]]]:
        """As Trainer's, on rank 0: of the other ranks what has arrived; empty elsewhere."""
        ranks = self._ranks
        everything: list[list[tuple[int, dict[str, float]]]] = [[] for _ in self.plan.stages]
        with self._mail_lock:
            own = self._stage.take_losses()
            if ranks.rank == 0:
                everything[0] = own
                for k in range(1, self.plan.num_stages):
                    everything[k] = list(self._received(k))
            elif own and ranks.replica == 0:
                ranks.post(f"losses/{ranks.stage}/{self._num_sent}", own)
                self._num_sent += 1
        return everything

    def _received(self, stage: int) -> Iterator[tuple[int, dict[str, float]]]:
        while True:
            key = f"losses/{stage}/{self._num_received[stage]}"
            if (rows := self._ranks.find(key)) is None:
                return
            self._ranks.forget(key)
            self._num_received[stage] += 1
            yield from ((step, losses) for step, losses in rows)

    # ------------------------------------------------------------------ inference

    @torch.no_grad()
    def predict(self, inputs: Inputs) -> list[Tensor]:
        """The logits of every exit, on the CPU of every rank.

        Raises:
            DataError: inputs of other names, dtypes, or numbers of dimensions.
        """
        values = named_inputs(self.plan.inputs, inputs)
        self.drain()
        labels = torch.zeros(next(iter(values.values())).shape[0], dtype=torch.int64)
        found, _ = self._forward(values, labels)
        exits = []
        for i, stage in enumerate(_exit_stages(self.plan)):
            logits = found[i].float().cpu().contiguous() if i in found else None
            source = self._ranks.rank_of(stage)
            shape = torch.tensor(logits.shape if logits is not None else [0, 0])
            dist.broadcast(shape, source, group=self._ranks.stage_group)
            if logits is None:
                logits = torch.empty(*shape.tolist())
            dist.broadcast(logits, source, group=self._ranks.stage_group)
            exits.append(logits)
        return exits

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any]) -> Evaluation:
        """Accuracy and cross entropy over `batches`, the same on every rank.

        Raises:
            DataError: there is no sample; inputs or labels that do not fit, as in `step`.
        """
        self.drain()
        exits = _exit_stages(self.plan)
        tallies = {i: Tally() for i, stage in enumerate(exits) if stage == self._ranks.stage}
        for index, batch in enumerate(batches):
            inputs, labels = (batch.inputs, batch.labels) if hasattr(batch, "labels") else batch
            values = named_inputs(self.plan.inputs, inputs)
            num_samples = next(iter(values.values())).shape[0]
            check_labels(labels, num_samples, self.plan.num_classes)
            if len(labels) != num_samples:
                raise DataError(f"{num_samples} samples have {len(labels)} labels")
            if index % self._ranks.num_replicas == self._ranks.replica:
                found, labels = self._forward(values, labels)
                for i, logits in found.items():
                    tallies[i].add([logits], labels)
        return self._together(tallies, len(exits))

    def _forward(
        self, values: dict[str, Tensor], labels: Tensor
    ) -> tuple[dict[int, Tensor], Tensor]:
        """This stage's part of the inference: its exits' logits by exit, and the labels."""
        engine, stage, k = self._rank_engine, self._stage, self._ranks.stage
        key = ("evaluation", *batch_key(values, labels))
        with engine.telling_failures(), stage.lane.scope():
            if engine.inbox is not None:
                engine.inbox.post(key)
                values = engine.inbox.take()
                labels = values.pop(LABELS)
            values = stage.lane.receive(values, None)
            spec = self.plan.stages[k]
            with evaluating([stage.module]):
                outputs = as_tuple(stage.module(*(values[name] for name in spec.inputs)))
                values |= dict(zip(spec.outputs, outputs, strict=True))
                found = self._exits(values)
            if engine.outbox is not None:
                sent = {name: values[name] for name in _crossings(self.plan, k) if name in values}
                engine.outbox.send(key, {**sent, LABELS: labels.to(stage.lane.device)})
        return found, labels

    def _exits(self, values: Mapping[str, Tensor]) -> dict[int, Tensor]:
        found = {}
        for i, stage in enumerate(_exit_stages(self.plan)):
            if stage == self._ranks.stage:
                is_last = i == len(_exit_stages(self.plan)) - 1
                found[i] = (
                    values[self.plan.outputs[0]]
                    if is_last
                    else self._local_exit(self._stage, values)
                )
        return found

    def _together(self, tallies: Mapping[int, Tally], num_exits: int) -> Evaluation:
        """The sums of all ranks."""
        sums = torch.zeros(num_exits, 3, dtype=torch.float64)
        for i, tally in tallies.items():
            sums[i] = torch.tensor(tally.sums, dtype=torch.float64)
        dist.all_reduce(sums)
        counts, correct, losses = sums.unbind(1)
        if not counts[-1]:
            raise DataError("there is no sample to evaluate on")
        return Evaluation(
            num_samples=int(counts[-1]),
            accuracies=tuple((correct / counts).tolist()),
            losses=tuple((losses / counts).tolist()),
        )

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Tensor]:
        """As Trainer's, on rank 0; elsewhere the tensors of this rank's stage."""
        self.drain()
        self._stage.check_finite()
        ranks = self._ranks
        own = self._own_state()
        if ranks.rank != 0:
            if ranks.replica == 0:
                for name in sorted(own):
                    dist.send(own[name], 0)
            return own
        shapes = self.model.state_dict(keep_vars=True)
        for k in range(1, self.plan.num_stages):
            for name in sorted(self._state_names(k)):
                own[name] = torch.empty(shapes[name].shape, dtype=shapes[name].dtype)
                dist.recv(own[name], k)
        first = {id(shapes[name]): value for name, value in own.items()}
        rest = [name for name, value in shapes.items() if id(value) not in first]
        unused = self._read(rest)
        return {
            name: first[id(value)] if id(value) in first else unused[name]
            for name, value in shapes.items()
        }

    def _state_names(self, stage: int) -> list[str]:
        """The names in the model's state_dict that `stage` answers for."""
        spec, known = self.plan.stages[stage], self.model.state_dict()
        return [name for name in (*spec.parameters, *spec.buffers) if name in known]

    def _own_state(self) -> dict[str, Tensor]:
        state = self._stage.module.state_dict()
        names = self._state_names(self._ranks.stage)
        return {n: state[n].detach().to("cpu", copy=True).contiguous() for n in names}

    def save(
        self,
        run: Path,
        facts: Mapping[str, Any] | None = None,
        *,
        before_complete: Callable[[], None] | None = None,
    ) -> None:
        """As Trainer's: every rank of the first replica writes its stage into `run`, which all of
        them must see; rank 0 completes the set.
        """
        self._rank_engine.finish()
        if self._ranks.replica == 0:
            self._num_saves += 1
            super().save(run, facts, before_complete=before_complete)

    def _is_saved(self) -> bool:
        """In the writer's thread."""
        ranks, count = self._ranks, self._num_saves
        if ranks.rank != 0:
            self.take_losses()  # first: a checkpoint's losses are in the log before it counts
            ranks.post(f"saved/{count}/{ranks.stage}", True)
            return False
        for k in range(1, self.plan.num_stages):
            ranks.wait_for(f"saved/{count}/{k}")
        return True

    def wait_saved(self) -> None:
        """As Trainer's."""
        self.drain()
        self._saver.join(self._engine)

    def load(self, directory: Path) -> None:
        """As Trainer's. A checkpoint has the random streams of the first replica; the others go on
        with new ones.
        """
        super().load(directory)
        if self._ranks.replica:
            seed = spread_seed(self._stage_seed(self._ranks.stage), self.num_steps)
            self._stage.random = StageRandom(seed, self._stage.lane.device)


def _crossings(plan: Plan, cut: int) -> tuple[str, ...]:
    """Names of what may cross `cut`, labels among them; none outside of the model."""
    if not 0 <= cut < len(plan.cuts):
        return ()
    return (*(crossing.name for crossing in plan.cuts[cut].crossings), LABELS)


def _exit_stages(plan: Plan) -> tuple[int, ...]:
    """The stage of every exit, in the order in which Trainer.predict gives them."""
    early = [int(text[:-1]) for text in plan.inference if not text.endswith("F")]
    return (*early, plan.num_stages - 1)
