"""The Triton forward over the upper triangle, in the process that test_supcon_triton starts.

Batches this small compare labels in the tile and go by rows: here that limit is lowered.
"""

import itertools
import random

import pytest
import torch
from supcon_peers import CHOICES, OPTIONS, assert_guarded, loss_and_gradient, random_batch
from torch import Tensor

from benchmarks.kernels.grid import CASES, Case, broken
from scpl_compile.kernels import supcon_loss, triton_kernels, triton_triangle
from scpl_compile.kernels.offline import ARCHITECTURES
from scpl_compile.kernels.routes import Route, route

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def class_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scpl_compile.kernels.routes.MAX_LABELS_BATCH", 0)


def supcon(features: Tensor, labels: Tensor, **options: object) -> Tensor:
    loss = supcon_loss(features.to(DEVICE), labels.to(DEVICE), impl="triton", **options)
    return loss.to(features.device)


def way(
    batch: int, dim: int, dtype: torch.dtype = torch.float32, temperature: float = 0.1
) -> Route:
    return route(batch, dim, dtype, "interpreter", temperature, True)


SHAPES = [(192, 20), (193, 33), (255, 40), (256, 17), (321, 48), (400, 64), (448, 31)]
"""(B, D): an odd and an even number of full blocks, with and without a ragged end."""
TALL = [(640, 8), (700, 8)]


def cases() -> list[Case]:
    """Half of those of the grid that take this path, and the shapes above in every dtype."""
    found = [case for case in CASES if case.batch == 300 and case.temperature > 0.01][::2]
    draw = random.Random(1)
    for dtype, rows in zip(
        (torch.float32, torch.bfloat16, torch.float16), ("plain", "duplicated", "zero"), strict=True
    ):
        for batch, dim in [*SHAPES, *TALL]:
            found.append(
                Case(
                    batch=batch,
                    dim=dim,
                    dtype=dtype,
                    temperature=draw.choice((1.0, 0.1, 0.03)),
                    classes=draw.choice(("few", "few", "one", "distinct")),
                    rows=rows,
                    divisor=draw.choice(("scpl", "khosla")),
                    reduction=draw.choice(("mean", "none")),
                )
            )
    return found


@pytest.mark.parametrize("case", cases(), ids=str)
def test_it_is_as_close_to_the_truth_as_torch(case: Case) -> None:
    folds = way(case.batch, case.dim, case.dtype, case.temperature).distances
    assert folds or (case.dim == 8 and case.dtype == torch.float32)
    assert broken(supcon, case, roundings=3) == ""


def test_the_shapes_take_this_path_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {shape: way(*shape, torch.bfloat16) for shape in [*SHAPES, *TALL]}
    assert all(one.distances for one in ways.values())
    assert {shape for shape, one in ways.items() if one.forward.block_m == 128} == set(TALL)
    assert any(batch // 64 % 2 for batch, _ in SHAPES) and any(b // 64 % 2 == 0 for b, _ in SHAPES)
    launched = []
    function = type(triton_triangle.triangle_kernel)
    run = function.run

    def note(self: object, *args: object, **kwargs: object) -> object:
        launched.append(self)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(function, "run", note)
    supcon(*random_batch(192, 20, 9, torch.float32), **OPTIONS)
    assert triton_triangle.triangle_kernel in launched
    assert triton_kernels.forward_kernel not in launched


@pytest.mark.parametrize("shape", [(192, 20), (256, 17), (321, 48), (700, 8)], ids=str)
def test_by_rows_it_differs_in_last_bits_only(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    features, labels = random_batch(*shape, 9, torch.float16)
    options = {**OPTIONS, "reduction": "none"}
    folded = loss_and_gradient(supcon, features, labels, **options)
    again = loss_and_gradient(supcon, features, labels, **options)
    assert torch.equal(folded[0], again[0]) and torch.equal(folded[1], again[1])
    tiles = way(*shape).forward
    monkeypatch.setattr("scpl_compile.kernels.routes._folded", lambda *_: (tiles, 0))
    assert not way(*shape).distances
    by_rows = loss_and_gradient(supcon, features, labels, **options)
    torch.testing.assert_close(folded[0], by_rows[0], rtol=1e-5, atol=1e-5)
    atol = 2e-3 * by_rows[1].abs().max().item()
    torch.testing.assert_close(folded[1], by_rows[1], rtol=2e-3, atol=atol)


@pytest.mark.parametrize("shape", [(192, 20), (256, 17), (321, 48)], ids=str)
@pytest.mark.parametrize("options", CHOICES[:2])
def test_nothing_is_written_or_read_outside(
    shape: tuple[int, int], options: dict[str, object]
) -> None:
    assert way(*shape).distances
    assert_guarded(shape, options, DEVICE)


def test_where_logits_have_no_bound_it_goes_by_rows() -> None:
    assert way(400, 20).distances and not way(400, 20, temperature=0.005).distances
    assert not route(400, 20, torch.float32, "interpreter", 0.1, False).distances


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_workspace_is_no_more_than_the_gradient(
    monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    """Of a GPU, with the limit of labels as it is."""
    monkeypatch.undo()
    dtypes = (torch.bfloat16, torch.float32)
    folded = set()
    for batch, dim, dtype in itertools.product(range(1000, 300000, 3001), (8, 32, 64, 128), dtypes):
        one = route(batch, dim, dtype, architecture, 0.1, True)
        if one.distances:
            assert not one.labels and one.groups + one.distances <= dim
            assert one.distances == (batch // one.forward.block_m - 1) // 2
            assert one.batch_pad % one.forward.block_m == 0
            folded.add((dim, dtype))
    assert {(64, torch.bfloat16), (128, torch.bfloat16)} < folded
    for batch in (8192, 16384, 65536):
        assert route(batch, 128, torch.bfloat16, architecture, 0.1, True).distances
