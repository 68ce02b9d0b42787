"""The trainer of one rank: the same calls, each made by every rank."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scpl_compile.actions import SCHEDULES, Action
from scpl_compile.errors import DataError, MethodError
from scpl_compile.ir import MULTI_LABEL, Plan
from scpl_compile.runtime.activity import Usage
from scpl_compile.runtime.batch import Inputs, labelled, named_inputs, num_samples
from scpl_compile.runtime.batch_engine import BatchEngine
from scpl_compile.runtime.engine import Event, StageEngine
from scpl_compile.runtime.evaluation import Evaluation, Tally
from scpl_compile.runtime.exits import save_exits
from scpl_compile.runtime.inference import EarlyExits
from scpl_compile.runtime.lane import Lane
from scpl_compile.runtime.mail import Letter, Losses, Mail
from scpl_compile.runtime.meeting import as_posted, telling_lost_ranks
from scpl_compile.runtime.own_stage import keep_stage
from scpl_compile.runtime.randomness import StageRandom, spread_seed
from scpl_compile.runtime.rank_engine import RankEngine
from scpl_compile.runtime.rank_inference import RankInference, crossing_names
from scpl_compile.runtime.ranks import Ranks
from scpl_compile.runtime.replicas import averaged, contrast_globally
from scpl_compile.runtime.sharding import Sharded, whole_tensor
from scpl_compile.runtime.trainer import StageClass, Trainer
from scpl_compile.runtime.whole_batches import whole_batches

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
        replicate: "ddp", every replica holds its stage whole, or "fsdp", a part of it.
        microbatches: of gpipe, 1f1b and zb. batch_size: of a full batch of this replica, to be
            split into them; default: the plan's.
        partial_stages: those of which a step may leave a parameter without a gradient; None: all.
        options: those of Trainer; devices are told by `ranks`.
    """

    _on_ranks = True

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
        replicate: str = "ddp",
        microbatches: int = 1,
        batch_size: int | None = None,
        partial_stages: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        if contrast == "global" and _own_losses(plan):
            raise MethodError(
                f"contrast 'global': method {plan.method!r} has losses of your own, and each "
                "replica computes them over its share of the batch; take contrast 'local'"
            )
        self._ranks = ranks = ranks.apart()  # from the trainers before it
        self._names = names
        self._read = read
        self._contrast = contrast
        self._is_sharded = _is_sharded(replicate, ranks)
        self._sharded: dict[int, Sharded] = {}
        self._microbatches = (microbatches, batch_size or plan.batch_size)
        everyone = range(plan.num_stages)
        self._partial = frozenset(everyone if partial_stages is None else partial_stages)
        self._mail_lock = threading.Lock()  # the writer of checkpoints takes losses too
        self._mail = Mail(ranks)
        self._usage = {k: Usage(waiting=0.0, queue_fill=0.0) for k in range(plan.num_stages)}
        self._num_saves = 0
        torch.set_num_threads(options.get("threads_per_stage") or plan.threads_per_stage)
        super().__init__(plan, model, stages, **options)
        self._inference = RankInference(plan, self._stages, ranks, self._sharded)

    # ------------------------------------------------------------------ what is made

    def _resolve_devices(self, names: tuple[str, ...]) -> tuple[torch.device, ...]:
        ranks = self._ranks
        ranks.post(f"device/{ranks.rank}", str(ranks.device))
        row = range(self.plan.num_stages)
        return tuple(torch.device(ranks.wait_for(f"device/{ranks.rank_of(k)}", str)) for k in row)

    def _make_all(
        self, stages: Sequence[StageClass], lanes: Mapping[int, Lane]
    ) -> dict[int, nn.Module]:
        modules = {k: self._make(k, stages[k]) for k in lanes}
        mine = nn.ModuleList(modules.values())
        tensors = (*mine.parameters(), *mine.buffers())
        own = [self._names[id(tensor)] for tensor in tensors if id(tensor) in self._names]
        keep_stage(self.model, mine, self._names, self._read(own))
        for k, module in modules.items():
            contrast_globally(module, self._contrast, self._ranks.replica_group)
            modules[k] = module.to(lanes[k].device)
            if self._is_sharded and self.schedule in SCHEDULES:
                self._sharded[k] = Sharded(module, self._ranks.mesh["replica"])
        return modules

    def _own_stages(self) -> Sequence[int]:
        return self._ranks.stages

    def _stage_seed(self, stage: int) -> int:
        """Every replica draws its own masks; the first those of a run without replicas."""
        seed, replica = super()._stage_seed(stage), self._ranks.replica
        return spread_seed(seed, replica) if replica else seed

    def _training_step(self, module: nn.Module) -> Callable[..., Any]:
        if self._ranks.num_replicas == 1 or self.schedule not in SCHEDULES:
            return super()._training_step(module)
        if self._sharded:  # of its only stage
            return next(iter(self._sharded.values()))
        return averaged(module, self._ranks.replica_group, leaves_some=self._leaves_some())

    def _leaves_some(self) -> bool:
        return not self._partial.isdisjoint(self._own_stages())

    def _start_engine(
        self, first_step: int, actions: Sequence[Iterator[Action]] | None = None
    ) -> StageEngine:
        if self.schedule not in SCHEDULES:
            run = whole_batches(
                self.plan, self._stages, self._ranks, self.schedule, *self._microbatches,
                leaves_some=self._leaves_some(),
            )  # fmt: skip
            self._rank_engine: BatchEngine | RankEngine = BatchEngine(
                self._stages, self._ranks, run, first_step
            )
        else:
            (k,) = self._ranks.stages
            self._rank_engine = RankEngine(
                self._stages[0],
                self._ranks,
                schedule=self.schedule,
                crossings=(crossing_names(self.plan, k - 1), crossing_names(self.plan, k)),
                first_step=first_step,
                starts=self.starts,
                record_events=self._max_events != 0,
                max_events=self._max_events,
            )
        return self._rank_engine

    # ------------------------------------------------------------------ training

    def drain(self) -> None:
        """Wait until every rank has finished every submitted step, and has told its losses."""
        self._rank_engine.finish()
        if self._ranks.rank != 0:
            self.take_losses()
        super().drain()

    def take_losses(self) -> list[Losses]:
        """As Trainer's, on rank 0: of the other ranks what has arrived; empty elsewhere."""
        ranks = self._ranks
        everything: list[Losses] = [[] for _ in self.plan.stages]
        with self._mail_lock:
            own = {stage.index: stage.take_losses() for stage in self._stages}
            if ranks.rank == 0:
                for k, rows in own.items():
                    everything[k] += rows
                for letter in self._mail.received():
                    self._usage |= letter.usage
                    for k, rows in letter.losses.items():
                        everything[k] += rows
            elif ranks.replica == 0 and any(own.values()):
                usage = {stage.index: stage.activity.take() for stage in self._stages}
                self._mail.send(Letter(losses=own, usage=usage))
        return everything

    def take_usage(self) -> list[Usage]:
        """As Trainer's, on rank 0: of the other ranks the latest that has arrived."""
        for stage in self._stages:
            self._usage[stage.index] = stage.activity.take()
        return [self._usage[k] for k in range(self.plan.num_stages)]

    def all_events(self) -> tuple[Event, ...]:
        """As Trainer's, on rank 0; elsewhere this rank's own. Ranks of one host share a clock."""
        ranks = self._ranks
        if ranks.rank != 0:
            if ranks.replica == 0:
                rows = [(str(e.action), e.start_ns, e.end_ns) for e in self.events]
                ranks.post(f"events/{ranks.rank}", rows)
            return self.events
        others = map(self._events_of, range(1, ranks.num_columns))
        return (*self.events, *chain.from_iterable(others))

    def _events_of(self, rank: int) -> list[Event]:
        rows = self._ranks.wait_for(key := f"events/{rank}", list)
        with as_posted(key):
            return [Event(Action.parse(action), start, end) for action, start, end in rows]

    def __exit__(self, *exception: object) -> None:
        """Drains if all went well: another trainer among these ranks would receive what is under
        way.
        """
        if exception[0] is None:
            self.drain()
        super().__exit__(*exception)

    # ------------------------------------------------------------------ inference

    def predict(self, inputs: Inputs) -> list[Tensor]:
        """The logits of every exit, float32 on the CPU, on every rank.

        Raises:
            DataError: inputs of other names, dtypes, or numbers of dimensions.
        """
        values = named_inputs(self.plan.inputs, inputs)
        self.drain()
        labels = torch.zeros(num_samples(values), dtype=torch.int64)
        with telling_lost_ranks(f"rank {self._ranks.rank}"):
            found, _ = self._inference.run(values, labels, self.num_active)
            return self._inference.shared(found, self.num_active)

    def predict_early(self, inputs: Inputs, rule: str) -> EarlyExits:
        """Not over ranks: how many rows a later stage gets depends on data.

        Raises:
            MethodError: always.
        """
        raise MethodError(
            f"exit rule {rule!r} is of inference in one process: scpl evaluate DIRECTORY --exit "
            f"{rule}, or a trainer without ranks"
        )

    def evaluate(self, batches: Iterable[Any], *, exit_rule: str | None = None) -> Evaluation:
        """Accuracy and cross entropy over `batches`, the same on every rank.

        Raises:
            DataError: there is no sample; inputs or labels that do not fit, as in `step`.
            MethodError: there is an exit_rule, as in `predict_early`.
        """
        if exit_rule is not None:
            self.predict_early((), exit_rule)
        self.drain()
        with telling_lost_ranks(f"rank {self._ranks.rank}"):
            return self._evaluate(batches)

    def _evaluate(self, batches: Iterable[Any]) -> Evaluation:
        exits = [k for k in self._inference.exit_stages if k < self.num_active]
        tallies = {i: Tally() for i, stage in enumerate(exits) if stage in self._ranks.stages}
        for index, batch in enumerate(batches):
            values, labels = labelled(self.plan, batch)
            # A sharded stage is gathered for every forward, so all replicas take every batch.
            if self._is_sharded or index % self._ranks.num_replicas == self._ranks.replica:
                found, labels = self._inference.run(values, labels, self.num_active)
                for i, logits in found.items():
                    tallies[i].add([logits], labels)
        return self._together(tallies, len(exits))

    def _together(self, tallies: Mapping[int, Tally], num_exits: int) -> Evaluation:
        """The sums of all ranks."""
        sums = torch.zeros(num_exits, 4, dtype=torch.float64)
        for i, tally in tallies.items():
            sums[i] = torch.tensor(tally.sums, dtype=torch.float64)
        dist.all_reduce(sums)
        counts, correct, exact, losses = sums.unbind(1)
        is_multi_label = self.plan.task == MULTI_LABEL
        if not counts[-1]:
            raise DataError("there is no sample to evaluate on")
        return Evaluation(
            num_samples=int(counts[-1]) // (self._ranks.num_replicas if self._is_sharded else 1),
            accuracies=tuple((correct / counts).tolist()),
            losses=tuple((losses / counts).tolist()),
            exact_matches=tuple((exact / counts).tolist()) if is_multi_label else (),
        )

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Tensor]:
        """As Trainer's, on rank 0; elsewhere the tensors of this rank's stages."""
        self.drain()
        own: dict[str, Tensor] = {}
        for stage in self._stages:
            stage.check_finite()
            state = stage.module.state_dict()
            for name in self._state_names(stage.index):
                value = whole_tensor(state[name].detach())
                own[name] = value.to("cpu", copy=True).contiguous()
        ranks = self._ranks
        with telling_lost_ranks(f"rank {ranks.rank}"):
            if ranks.rank == 0:
                return self._complete_state(own)
            if ranks.replica == 0:
                for k in ranks.stages:
                    for name in self._state_names(k):
                        dist.send(own[name], 0)
        return own

    def _complete_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`state` of rank 0 with the other ranks' tensors, and those that no stage has."""
        model = self.model.state_dict(keep_vars=True)
        others = [k for k in range(self.plan.num_stages) if k not in self._ranks.stages]
        for k in sorted(others, key=lambda k: (self._ranks.columns[k], k)):
            for name in self._state_names(k):
                state[name] = torch.empty(model[name].shape, dtype=model[name].dtype)
                dist.recv(state[name], self._ranks.rank_of(k))
        # A shared tensor has several names and one value.
        values = {id(model[name]): value for name, value in state.items()}
        unused = self._read(name for name, value in model.items() if id(value) not in values)
        return {
            name: values[id(value)] if id(value) in values else unused[name]
            for name, value in model.items()
        }

    def _state_names(self, stage: int) -> list[str]:
        """The names in the model's state_dict that `stage` answers for."""
        spec, known = self.plan.stages[stage], self.model.state_dict()
        return [name for name in (*spec.parameters, *spec.buffers) if name in known]

    def save_exits(self, run: Path) -> None:
        """As Trainer's: every rank of the first replica writes those of its stages."""
        self.drain()
        writes = self._ranks.replica == 0
        save_exits(run, self.plan, self._stages, self.num_steps, writes=writes)

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
            super().save(run, facts, before_complete=before_complete)
        elif self._is_sharded:
            for stage in self._stages:
                stage.state()  # its parts are gathered from all replicas

    def _is_saved(self) -> bool:
        """In the writer's thread, which alone counts: another save may have been asked for."""
        self._num_saves += 1
        ranks, count = self._ranks, self._num_saves
        if ranks.rank != 0:
            self.take_losses()  # first: a checkpoint's losses are in the log before it counts
            ranks.post(f"saved/{count}/{ranks.rank}", True)
            return False
        for rank in range(1, ranks.num_columns):
            ranks.wait_for(f"saved/{count}/{rank}", bool)
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
        self.take_losses()  # what the others told is of another past
        if self._ranks.replica:
            for stage in self._stages:
                seed = spread_seed(self._stage_seed(stage.index), self.num_steps)
                stage.random = StageRandom(seed, stage.lane.device)


def _own_losses(plan: Plan) -> bool:
    return any(loss.source is not None for stage in plan.stages for loss in stage.losses)


def _is_sharded(replicate: str, ranks: Ranks) -> bool:
    if replicate not in ("ddp", "fsdp"):
        raise MethodError(f"replicate {replicate!r} is not one of ddp, fsdp")
    return replicate == "fsdp" and ranks.num_replicas > 1
