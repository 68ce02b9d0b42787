"""Micro-batches in torch's schedules give the gradients of the unsplit model.

"zb" on one rank holds both stages of a program of two, so much is seen without another process.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from pipelined_nets import (
    BATCH_SIZE,
    WIDTH,
    batch,
    compile_bp,
    compile_text,
    eager,
    load,
)
from scpl_compile.actions import Action, pipeline_actions, placement
from scpl_compile.errors import DataError, MethodError
from scpl_compile.ir import Plan
from scpl_compile.runtime.pipelined import PipelinedStep, _Stage, check_pipelined
from scpl_compile.runtime.whole import Whole

pytestmark = pytest.mark.timeout(120)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Programs of Text by their number of stages."""
    home = tmp_path_factory.mktemp("text")
    return {k: compile_text(home / str(k), k) for k in (2, 4)}


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make(directory: Path, schedule: str, num_microbatches: int, **options: Any) -> PipelinedStep:
    """The step of this rank; its stages are those of a model of its own."""
    plan, emitted, model = load(directory)
    rank = dist.get_rank(options.get("group"))
    own = [k for k, at in enumerate(placement(schedule, plan.num_stages)) if at == rank]
    return PipelinedStep(
        options.pop("plan", plan),
        {k: emitted.STAGES[k](model) for k in own},
        schedule=schedule,
        num_microbatches=num_microbatches,
        device=CPU,
        **options,
    )


def gradients(step: PipelinedStep) -> dict[str, Tensor]:
    stages = step._stages.values()
    return {name: p.grad for s in stages for name, p in s.named_parameters() if p.grad is not None}


def check_against_eager(directory: Path, step: PipelinedStep, *sizes: int) -> None:
    """Losses, and the sum of the gradients over batches of these sizes."""
    plan, _, model = load(directory)
    data = [batch(plan, size, seed) for seed, size in enumerate(sizes)]
    losses, expected = eager(model, data)
    for (values, labels), loss in zip(data, losses, strict=True):
        found = step.run(values if 0 in step._stages else {}, labels)
        assert (found is not None) == (plan.num_stages - 1 in step._stages)
        if found is not None:
            torch.testing.assert_close(found.item(), loss, rtol=1e-6, atol=1e-6)
    own = {name for stage in step._stages.values() for name, _ in stage.named_parameters()}
    given = gradients(step)
    assert given.keys() == own & expected.keys()
    for name, gradient in given.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)


# ---------------------------------------------------------------------- several processes

KINDS = {"forward_one_chunk": "F", "backward_one_chunk": "B", "backward_weight_one_chunk": "W"}


def recorded(seen: list[Action], method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` of a stage, which writes down that it ran."""

    @wraps(method)
    def run(self: _Stage, chunk: int, *args: Any, **kwargs: Any) -> Any:
        kind = KINDS[method.__name__]
        if not kwargs.get("full_backward", True):
            kind = "I"
        seen.append(Action(self.stage_index, kind, chunk))
        return method(self, chunk, *args, **kwargs)

    return run


def check_schedule(directory: Path, schedule: str, num_ranks: int) -> None:
    """Full batches, smaller ones, one of a prime number: the gradients and the order of work."""
    seen: list[Action] = []
    methods = {name: recorded(seen, getattr(_Stage, name)) for name in KINDS}
    refuse = mock.Mock(side_effect=AssertionError("pickled objects travel"))
    with (
        mock.patch.multiple(_Stage, **methods),
        mock.patch.multiple(dist, send_object_list=refuse, recv_object_list=refuse),
    ):
        step = make(directory, schedule, 4)
        check_against_eager(directory, step, BATCH_SIZE, 6, 7, BATCH_SIZE)
    order = list(pipeline_actions(schedule, dist.get_rank(), num_ranks, 4))
    assert seen[: len(order)] == order == seen[-len(order) :]


def check_ddp(directory: Path) -> None:
    """The whole under DDP: each rank has half of the batch, all have the gradients of all of it."""
    plan, emitted, model = load(directory)
    values, labels = batch(plan, BATCH_SIZE)
    losses, expected = eager(model, [(values, labels)])
    model.zero_grad()
    whole = DistributedDataParallel(Whole(plan, [stage(model) for stage in emitted.STAGES]))
    half = slice(dist.get_rank(), None, 2)
    inputs = [values[spec.name][half] for spec in plan.inputs]
    _, found = whole(*inputs, labels=labels[half])
    sum(found.values()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    mean = sum(found.values()).detach() / 2
    dist.all_reduce(mean)
    torch.testing.assert_close(mean.item(), losses[0])


def check_replicas(directory: Path) -> None:
    """(2 replicas x 2 stages): each replica has half of the batch; their mean is of all of it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "stage"))
    step = make(directory, "1f1b", 2, group=mesh["stage"].get_group(), batch_size=4)
    plan, _, model = load(directory)
    values, labels = batch(plan, BATCH_SIZE)
    _, expected = eager(model, [(values, labels)])
    half = slice(mesh["replica"].get_local_rank(), None, 2)
    step.run({name: value[half] for name, value in values.items()}, labels[half])
    for name, gradient in gradients(step).items():
        dist.all_reduce(gradient, group=mesh["replica"].get_group())
        torch.testing.assert_close(gradient / 2, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def work(rank: int, num_ranks: int, store: Path, text: dict[int, Path]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=num_ranks)
    for schedule in ("gpipe", "1f1b"):
        check_schedule(text[num_ranks], schedule, num_ranks)
    if num_ranks == 2:
        check_schedule(text[4], "zb", num_ranks)
        check_ddp(text[2])
        with pytest.raises(MethodError, match="4 stages on 4 ranks, not 2; .* --nproc-per-node 4"):
            make(text[4], "gpipe", 4)
    else:
        check_replicas(text[2])
    dist.destroy_process_group()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_over_ranks_the_gradients_are_those_of_the_unsplit_model(
    num_ranks: int, text: dict[int, Path], tmp_path: Path
) -> None:
    """In torch's order, as actions.py tells it, and without a pickled object."""
    mp.spawn(work, (num_ranks, tmp_path / "store", text), nprocs=num_ranks)


# ---------------------------------------------------------------------- one process


@pytest.mark.parametrize("num_microbatches", [1, 2, 4, 8])
def test_zb_splits_the_backward_and_keeps_every_gradient(
    one_rank: None, text: dict[int, Path], num_microbatches: int
) -> None:
    step = make(text[2], "zb", num_microbatches)
    check_against_eager(text[2], step, BATCH_SIZE, BATCH_SIZE)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # verify's eval mode
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_zb_goes_through_checkpoint(one_rank: None, tmp_path: Path, use_reentrant: bool) -> None:
    program = compile_bp(
        tmp_path / "out", "Checkpointed", str(WIDTH), ["first"], use_reentrant=use_reentrant
    )
    check_against_eager(program, make(program, "zb", 2), BATCH_SIZE)


def test_a_frozen_stage_gets_no_gradient_and_hinders_none(
    one_rank: None, text: dict[int, Path]
) -> None:
    step = make(text[2], "zb", 2)
    for parameter in step._stages[0].parameters():
        parameter.requires_grad_(False)
    plan, _, model = load(text[2])
    values, labels = batch(plan, BATCH_SIZE)
    _, expected = eager(model, [(values, labels)])
    step.run(values, labels)
    given = gradients(step)
    assert given.keys() == {name for name, _ in step._stages[1].named_parameters()}
    for name, gradient in given.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_forward_runs_in_the_context_of_its_stage(one_rank: None, text: dict[int, Path]) -> None:
    around = mock.MagicMock()
    step = make(text[2], "zb", 2, around_forward=around)
    step.run(*batch(step.plan, BATCH_SIZE))
    assert sorted(call.args[0] for call in around.call_args_list) == [0, 0, 1, 1]
    assert around.return_value.__enter__.call_count == 4


def test_under_autocast_the_tensors_cross_in_the_dtype_of_the_plan(
    one_rank: None, text: dict[int, Path]
) -> None:
    cast = lambda stage: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    step = make(text[2], "zb", 2, around_forward=cast)
    values, labels = batch(step.plan, BATCH_SIZE)
    loss = step.run(values, labels)
    exact, expected = eager(load(text[2])[2], [(values, labels)])
    assert loss is not None and loss.dtype == torch.float32
    torch.testing.assert_close(loss.item(), exact[0], rtol=0.05, atol=0.05)
    assert gradients(step).keys() == expected.keys()


def test_batch_norm_is_warned_about_once(one_rank: None, tmp_path: Path) -> None:
    program = compile_bp(tmp_path / "out", "Normed", str(WIDTH), ["1"])
    step = make(program, "zb", 2)
    data = batch(step.plan, BATCH_SIZE)
    with pytest.warns(UserWarning, match="micro-batches of 4 samples change BatchNorm's") as seen:
        step.run(*data)
        step.run(*data)
    assert len(seen) == 1
    make(program, "zb", 1).run(*data)  # one micro-batch is the batch
    held = make(program, "zb", 2)
    for stage in held._stages.values():
        stage.eval()
    held.run(*data)


# ---------------------------------------------------------------------- refusals


def test_micro_batches_divide_the_batch(text: dict[int, Path]) -> None:
    plan = load(text[4])[0]
    with pytest.raises(MethodError, match="so 3 of a batch of 8 do not do; give 1, 2, 4, 8"):
        check_pipelined(plan, "gpipe", 3, 8)
    with pytest.raises(MethodError, match="one micro-batch per stage and .*so 2 .*give 4, 8"):
        check_pipelined(plan, "1f1b", 2, 8)
    with pytest.raises(MethodError, match="give batches of at least 4"):
        check_pipelined(plan, "1f1b", 2, 2)
    with pytest.raises(MethodError, match="so 0 of a batch of 8 do not do"):
        check_pipelined(plan, "gpipe", 0, 8)
    check_pipelined(plan, "1f1b", 8, 8)


def test_a_plan_that_stops_gradients_is_refused(tmp_path: Path) -> None:
    program = compile_bp(tmp_path / "out", "Normed", str(WIDTH), ["0"], method="scpl")
    with pytest.raises(MethodError, match="stop at cut 0 .method 'scpl'.; .* --method bp"):
        check_pipelined(load(program)[0], "gpipe", 2, 8)


def test_the_stages_of_another_rank_are_refused(one_rank: None, text: dict[int, Path]) -> None:
    plan, emitted, model = load(text[2])
    with pytest.raises(MethodError, match=r"rank 0 holds the stages \[0, 1\] .*, not \[1\]"):
        PipelinedStep(
            plan, {1: emitted.STAGES[1](model)}, schedule="zb", num_microbatches=2, device=CPU
        )


def test_inputs_of_another_shape_are_refused(one_rank: None, text: dict[int, Path]) -> None:
    step = make(text[2], "zb", 2)
    values, labels = batch(step.plan, BATCH_SIZE)
    with pytest.raises(DataError, match=r"'mask' is \(8, 3\); schedule 'zb' takes \(8, 5\)"):
        step.run({**values, "mask": values["mask"][:, :3]}, labels)
    with pytest.raises(DataError, match=r"'ids' is \(8, 5\).* takes \(4, 5\).* for 4 labels"):
        step.run(values, labels[:4])


def altered(plan: Plan, **changes: Any) -> Plan:
    """The plan whose first gradient-carrying tensor at cut 0 has another meta."""
    cut = plan.cuts[0]
    place = next(i for i, c in enumerate(cut.crossings) if c.meta.requires_grad)
    crossings = list(cut.crossings)
    meta = replace(crossings[place].meta, **changes)
    crossings[place] = replace(crossings[place], meta=meta)
    return replace(plan, cuts=(replace(cut, crossings=tuple(crossings)),))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_dim": None}, r"at cut 0 is \(4, .*, not \(8, .*another cut with --split-at"),
        ({"requires_grad": False}, "at cut 0 carries a gradient, .* compile again"),
    ],
)
def test_what_crosses_otherwise_than_planned_is_refused(
    one_rank: None, text: dict[int, Path], changes: dict[str, Any], message: str
) -> None:
    plan = load(text[2])[0]
    step = make(text[2], "zb", 2, plan=altered(plan, **changes))
    with pytest.raises(MethodError, match=message):
        step.run(*batch(plan, BATCH_SIZE))
