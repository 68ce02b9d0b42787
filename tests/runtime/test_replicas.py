"""Two replicas of two stages: the gradients of one process with the whole batch.

In float64, and by SGD with a learning rate of 1, so that a step tells the gradient.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from processes import start, wait_all
from scpl_compile import compile_model
from scpl_compile.errors import MethodError
from scpl_compile.inputs import example_inputs
from scpl_compile.runtime.data import Batch
from scpl_compile.runtime.program import load_stages, read_plan
from scpl_compile.runtime.ranks import join
from scpl_compile.runtime.replicas import contrast_globally
from scpl_compile.runtime.sharding import whole_tensor
from scpl_compile.runtime.trainer import Trainer

pytestmark = pytest.mark.timeout(120)

NET = '''
from torch import nn


def build_model(norm=False):
    """(B, 1, 8, 8) to (B, 5); nothing joins samples or draws, but for batch norm."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.Tanh(),
        nn.Conv2d(6, 6, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(24, 5),
    )
'''
STEP = {"optimizer": "sgd", "lr": 1.0}
TOLERANCE = 1e-12
"""Of float64; 1e-6 is what is promised in float32."""


@contextmanager
def float64() -> Iterator[None]:
    """Heads and models are made in it."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name: two stages, one stage, with batch norm, backpropagation, early exits.

    Where nothing else is said no head has batch norm, as that of kind conv has; a cut through
    vectors has none either.
    """
    home = tmp_path_factory.mktemp("replicas")
    (home / "net.py").write_text(NET)
    kinds: dict[str, dict[str, Any]] = {
        "scpl": {"num_stages": 2, "options": {"head": "mlp"}},
        "one": {"num_stages": 1},
        "norm": {"num_stages": 2, "config": {"norm": True}},
        "bp": {"num_stages": 2, "method": "bp"},
        "early_exit": {"split_at": ["6"], "method": "early_exit"},
        "predsim": {"num_stages": 2, "method": "predsim"},
        "deinforeg": {"num_stages": 2, "method": "deinforeg", "options": {"head": "mlp"}},
        "al": {"num_stages": 2, "method": "al"},
        "several": {"num_stages": 2, "options": {"head": "mlp"}, "task": "multi-label"},
    }
    with float64():
        for name, options in kinds.items():
            compile_model(
                f"{home}/net.py:build_model", "float64:1x8x8", out=home / name, batch_size=8,
                threads_per_stage=1, **options,
            )  # fmt: skip
    return {name: home / name for name in kinds}


def batch(directory: Path, views: int = 1, size: int = 8, seed: int = 0) -> Batch:
    plan = read_plan(directory)
    inputs = tuple(example_inputs(plan.inputs, views * size, seed=seed))
    labels = (torch.arange(size) + seed) % 3
    if plan.task == "multi-label":
        labels = torch.eye(5)[labels].bool() | torch.eye(5)[torch.arange(size) % 4].bool()
    return Batch(inputs=inputs, labels=labels, views=views)


def make(directory: Path, **options: Any) -> Trainer:
    stages = load_stages(directory, read_plan(directory))
    trainer: Trainer = stages.build_trainer(**{**STEP, **options})
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """All parameters of the stages of this process, heads too."""
    trainer.drain()
    return {
        f"{stage.index} {name}": whole_tensor(value.detach()).clone()
        for stage in trainer._stages
        for name, value in stage.module.named_parameters()
    }


def after_one_step(directory: Path, given: Batch, **options: Any) -> dict[str, Tensor]:
    with make(directory, **options) as trainer:
        trainer.step(given.inputs, given.labels)
        return weights(trainer)


CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("scpl", 1, {"contrast": "global"}),
    ("scpl", 2, {"contrast": "global"}),
    ("scpl", 1, {"contrast": "local"}),
    ("scpl", 1, {"contrast": "global", "accumulate": 2, "clip_norm": 0.01}),
    ("bp", 1, {}),
    ("early_exit", 1, {"contrast": "global"}),
    ("predsim", 1, {"contrast": "global"}),
    ("deinforeg", 1, {"contrast": "global"}),
    ("al", 1, {"contrast": "global"}),
    ("scpl", 1, {"contrast": "global", "replicate": "fsdp"}),
    ("scpl", 2, {"replicate": "fsdp", "accumulate": 2, "clip_norm": 0.01, "contrast": "global"}),
    ("bp", 1, {"replicate": "fsdp"}),
    ("several", 1, {"contrast": "global"}),
    ("several", 2, {"contrast": "global"}),
]
"""Program, views, options."""


def work(programs: dict[str, Path], results: Path) -> None:
    torch.set_default_dtype(torch.float64)
    found: dict[Any, Any] = {}
    for place, (name, views, options) in enumerate(CASES):
        directory = programs[name]
        ranks = join((0, 1), ["cpu"], read_plan(directory).digest)
        share = batch(directory, views).share(ranks.replica, 2)
        repeats = options.get("accumulate", 1)
        with make(directory, ranks=ranks, **options) as trainer:
            for _ in range(repeats):
                trainer.step(share.inputs, share.labels)
            found[place] = weights(trainer)
        if name == "early_exit":
            found["exits"] = inference(directory, ranks)
        ranks.leave()
    found["norm"] = normed(programs["norm"])
    (results / str(ranks.rank)).write_bytes(pickle.dumps((found, ranks.replica, ranks.stages)))


def inference(directory: Path, ranks: Any) -> Any:
    """What every rank sees of a trainer that has made two steps."""
    with make(directory, ranks=ranks, contrast="global", lr=0.1) as trainer:
        for seed in range(2):
            share = batch(directory, seed=seed).share(ranks.replica, 2)
            trainer.step(share.inputs, share.labels)
        whole = [batch(directory, seed=seed, size=8 - seed) for seed in range(3)]
        logits = trainer.predict(whole[0].inputs)
        evaluation = trainer.evaluate(whole)
        losses = trainer.losses()
        return logits, evaluation, trainer.state_dict(), losses


def normed(directory: Path) -> dict[str, Tensor]:
    """Buffers of batch norm after three steps."""
    ranks = join((0, 1), ["cpu"], read_plan(directory).digest)
    with make(directory, ranks=ranks, lr=0.1) as trainer:
        for seed in range(3):
            share = batch(directory, seed=seed).share(ranks.replica, 2)
            trainer.step(share.inputs, share.labels)
        trainer.drain()
        state = trainer.state_dict()
    ranks.leave()
    return state


@pytest.fixture(scope="module")
def ranks(programs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """(found, replica, stages) of each of the four."""
    results = tmp_path_factory.mktemp("results")
    ended = wait_all(start(work, [(programs, results)] * 4, results / "logs"))
    assert [one.code for one in ended] == [0] * 4, ended
    return [pickle.loads((results / str(rank)).read_bytes()) for rank in range(4)]


def expected_step(programs: dict[str, Path], name: str, views: int, options: dict[str, Any]) -> Any:
    """One process: the whole batch, or the mean of what the shares give by themselves."""
    directory = programs[name]
    options = dict(options)
    options.pop("accumulate", None)
    options.pop("replicate", None)
    is_whole = options.pop("contrast", "global") == "global"
    with float64():  # which tells what example_inputs draw, too
        whole = batch(directory, views)
        if is_whole:
            return after_one_step(directory, whole, **options)
        halves = [after_one_step(directory, whole.share(r, 2), **options) for r in range(2)]
        return {key: (halves[0][key] + halves[1][key]) / 2 for key in halves[0]}


@pytest.mark.parametrize("place", range(len(CASES)))
def test_replicas_step_as_one_process_would(
    place: int, programs: dict[str, Path], ranks: list[Any]
) -> None:
    name, views, options = CASES[place]
    expected = expected_step(programs, name, views, options)
    with float64():
        begun = weights(make(programs[name]))
    seen = set()
    for found, _, _ in ranks:
        for key, value in found[place].items():
            torch.testing.assert_close(
                value,
                expected[key],
                rtol=0,
                atol=TOLERANCE,
                msg=lambda told, key=key: f"{key}: {told}",
            )
            seen.add(key)
    assert seen == expected.keys()
    moved = {key for key in expected if not torch.equal(begun[key], expected[key])}
    left = {f"1 {name}" for name in read_plan(programs[name]).untrained}
    assert moved == expected.keys() - left


def test_the_contrast_makes_a_difference(programs: dict[str, Path], ranks: list[Any]) -> None:
    """Else the test above would not tell global from local."""
    found = ranks[0][0]
    assert any(not torch.allclose(found[0][key], found[2][key], atol=1e-4) for key in found[0])


def test_ranks_lie_in_rows_of_stages(ranks: list[Any]) -> None:
    assert [(replica, stages) for _, replica, stages in ranks] == [
        (0, (0,)), (0, (1,)), (1, (0,)), (1, (1,)),
    ]  # fmt: skip


def test_replicas_agree_on_what_they_predict_and_find(
    programs: dict[str, Path], ranks: list[Any]
) -> None:
    directory = programs["early_exit"]
    with float64(), make(directory, lr=0.1) as trainer:
        for seed in range(2):
            whole = batch(directory, seed=seed)
            trainer.step(whole.inputs, whole.labels)
        logits = trainer.predict(batch(directory).inputs)
        tests = [batch(directory, seed=seed, size=8 - seed) for seed in range(3)]
        evaluation = trainer.evaluate(tests)
        state = trainer.state_dict()
    for rank, (found, _, stages) in enumerate(ranks):
        predicted, evaluated, own, losses = found["exits"]
        assert len(predicted) == len(logits) == 2
        for one, other in zip(predicted, logits, strict=True):
            assert one.dtype == torch.float32 and one.device.type == "cpu"
            torch.testing.assert_close(one, other.float(), rtol=0, atol=1e-6)
        assert evaluated.num_samples == evaluation.num_samples == 8 + 7 + 6
        assert evaluated.accuracies == evaluation.accuracies
        assert evaluated.losses == pytest.approx(evaluation.losses, abs=1e-6)
        mine = {n for k in stages for n in trainer.plan.stages[k].parameters}
        assert own.keys() == (state.keys() if rank == 0 else mine)
        for name, value in own.items():
            torch.testing.assert_close(value, state[name], rtol=0, atol=TOLERANCE)
        assert [bool(terms) for terms in losses] == [rank == 0] * 2


def test_batch_norm_has_the_statistics_of_the_first_replica(ranks: list[Any]) -> None:
    """As DDP does it; the state is one."""
    state = ranks[0][0]["norm"]
    assert state["1.num_batches_tracked"] == 3
    for name, value in ranks[2][0]["norm"].items():
        if "running" not in name:  # of the last batch its own, before the next forward
            torch.testing.assert_close(value, state[name], rtol=0, atol=TOLERANCE)


# ---------------------------------------------------------------------- one stage, two replicas


def work_one(directory: Path, results: Path) -> None:
    torch.set_default_dtype(torch.float64)
    ranks = join((0,), ["cpu"], read_plan(directory).digest)
    share = batch(directory).share(ranks.replica, 2)
    with make(directory, ranks=ranks, contrast="global") as trainer:
        trainer.step(share.inputs, share.labels)
        found = weights(trainer)
        logits = trainer.predict(batch(directory).inputs)
    ranks.leave()
    (results / str(ranks.rank)).write_bytes(pickle.dumps((found, logits)))


def test_one_stage_in_two_replicas(programs: dict[str, Path], tmp_path: Path) -> None:
    directory = programs["one"]
    ended = wait_all(start(work_one, [(directory, tmp_path)] * 2, tmp_path / "logs"))
    assert [one.code for one in ended] == [0, 0], ended
    with float64():
        expected = after_one_step(directory, batch(directory))
    for rank in range(2):
        found, (logits,) = pickle.loads((tmp_path / str(rank)).read_bytes())
        assert found.keys() == expected.keys() and logits.shape == (8, 5)
        for key, value in found.items():
            torch.testing.assert_close(
                value,
                expected[key],
                rtol=0,
                atol=TOLERANCE,
                msg=lambda told, key=key: f"{key}: {told}",
            )


def test_another_contrast_is_refused() -> None:
    with pytest.raises(MethodError, match="contrast 'far' is not one of local, global"):
        contrast_globally(nn.Linear(1, 1), "far", None)  # type: ignore[arg-type]
