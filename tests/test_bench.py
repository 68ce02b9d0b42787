"""`scpl bench kernels`: what it writes, and that it skips what would not fit."""

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from scpl_compile import bench
from scpl_compile.kernels import supcon_loss


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK", ((8, 16), (4,)))


def test_quick_writes_a_row_for_each_size_and_candidate(
    scpl: Callable[..., Result], tmp_path: Path, tiny: None
) -> None:
    result = scpl("bench", "kernels", "--quick", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    with (tmp_path / "kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    sizes = {(row["batch"], row["dim"], row["candidate"]) for row in rows}
    assert {("8", "4", "fused"), ("8", "4", "eager"), ("16", "4", "fused")} <= sizes
    for row in rows:
        times = [float(row[name]) for name in ("p20_ms", "median_ms", "p80_ms")]
        assert 0 < float(row["forward_ms"]) and 0 < float(row["backward_ms"])
        assert 0 < times[0] <= times[1] <= times[2] and float(row["roofline_ms"]) > 0
        if row["candidate"] in bench.SAME:
            assert 0 < float(row["error"]) < 1e-4


def test_what_would_not_fit_is_skipped_with_the_reason(
    scpl: Callable[..., Result],
    tmp_path: Path,
    tiny: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "_free_bytes", lambda: 10000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scpl("bench", "kernels", "--quick", "-o", tmp_path)
    with (tmp_path / "kernels.csv").open() as file:
        notes = {(row["batch"], row["candidate"]): row["note"] for row in csv.DictReader(file)}
    assert notes["16", "eager"].startswith("skipped: 0.0 GiB of 0.0 GiB free")
    assert notes["8", "eager"] == notes["16", "fused"] == ""


def test_the_naive_loss_is_ours() -> None:
    features, labels = torch.randn(20, 5), torch.randint(0, 4, (20,))
    torch.testing.assert_close(bench.naive(features, labels), supcon_loss(features, labels))


@pytest.mark.parametrize("classes", [1, 4, 10**6])
def test_the_released_formula_is_ours_from_two_anchors_on(classes: int) -> None:
    features = torch.randn(20, 5, requires_grad=True)
    labels = torch.randint(0, classes, (20,))
    losses = [loss(features, labels) for loss in (bench.released, supcon_loss)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, features)[0] for loss in losses))
    one = features[:1], labels[:1]
    assert bench.released(*one).isnan() and supcon_loss(*one) == 0


def test_on_a_gpu_the_released_formula_and_inf_cl_are_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in has the signature of the package's function, and gives the same: mean InfoNCE."""
    assert not {"released", "inf-cl"} & bench.candidates(False).keys()
    assert "released" in bench.candidates(False, "cuda")
    (tmp_path / "inf_cl").mkdir()
    (tmp_path / "inf_cl" / "__init__.py").write_text(INF_CL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "inf_cl", raising=False)
    found = bench.candidates(False, "cuda")
    assert found.keys() <= bench.BYTES.keys() and "inf-cl" not in bench.SAME
    features = torch.randn(6, 32, requires_grad=True)
    loss = found["inf-cl"](features, torch.zeros(6).long())
    z = torch.nn.functional.normalize(features, dim=1)
    expected = torch.nn.functional.cross_entropy(z @ z.T / bench.TEMPERATURE, torch.arange(6))
    torch.testing.assert_close(loss, expected)
    monkeypatch.delitem(sys.modules, "inf_cl")


INF_CL = """
import torch


def cal_inf_loss(q, k, labels=None, scale=None, head_dim=256):
    assert labels is None and scale.dim() == 0 and q.shape[1] % head_dim == 0
    return torch.nn.functional.cross_entropy(scale * q @ k.T, torch.arange(len(q)))
"""
