"""`scpl bench kernels`: what it writes, and that it skips what would not fit."""

import csv
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
