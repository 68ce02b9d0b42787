"""What cannot run on fake tensors runs on data at two batch sizes."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from scpl_compile.capture.on_data import at_any_batch_size, run_on_data
from scpl_compile.capture.opening import Untraceable
from scpl_compile.capture.state import RandomState
from scpl_compile.capture.symbols import BatchSymbols

SIZE = 8


@pytest.fixture
def x() -> Iterator[Tensor]:
    """(batch, 3) without data; its mode is active."""
    mode = FakeTensorMode(
        shape_env=BatchSymbols(lambda question, fixes: None), allow_non_fake_inputs=True
    )
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK, DimDynamic.STATIC])
    value = mode.from_tensor(torch.randn(SIZE, 3).requires_grad_(), symbolic_context=context)
    with mode:
        yield value


def on_data(call: Any, x: Tensor, *more: Any, **kwargs: Any) -> Any:
    return run_on_data(call, (x, *more), kwargs, x.shape[0], SIZE)


def test_the_batch_is_found_in_sizes(x: Tensor) -> None:
    def call(x: Tensor) -> tuple[Tensor, dict[str, Any], int]:
        rows = torch.cat([x, x])[1:]
        assert x.detach().sum().item() != 0  # it has data
        return rows.double(), {"t": x.t().detach(), "n": x.shape[0]}, 5

    rows, named, five = on_data(call, x)
    batch = x.shape[0]
    assert isinstance(rows, FakeTensor)
    assert rows.shape[0] == 2 * batch - 1 and rows.shape[0].node.expr == (2 * batch - 1).node.expr
    assert rows.shape[1:] == (3,) and rows.dtype == torch.float64 and rows.requires_grad
    assert named["t"].shape[1].node.expr == batch.node.expr and not named["t"].requires_grad
    assert named["n"].node.expr == batch.node.expr
    assert five == 5


def test_arguments_have_the_sizes_of_the_batch(x: Tensor) -> None:
    seen = []

    def call(x: Tensor, mask: Tensor, size: int, weight: Tensor) -> Tensor:
        seen.append((x.shape[0], mask.shape, size, weight))
        assert mask.all() and x.requires_grad
        return x

    weight = nn.Parameter(torch.ones(2))
    mask = torch.ones(x.shape[0], dtype=torch.bool)
    on_data(call, x, mask, size=2 * x.shape[0], weight=weight)
    assert [s[:3] for s in seen] == [(8, (8,), 16), (8, (8,), 16), (9, (9,), 18)]
    assert all(s[3] is weight for s in seen)


def test_random_states_stay(x: Tensor) -> None:
    with unset_fake_temporarily():
        before = RandomState.now()
    on_data(lambda x: x * random.random() + torch.rand(3), x)
    with unset_fake_temporarily():
        assert RandomState.now() == before


def test_another_structure_is_refused(x: Tensor) -> None:
    with pytest.raises(Untraceable, match="another structure at another batch size"):
        on_data(lambda x: list(x.unbind(0)), x)


def test_a_size_that_torch_fixed_is_mended(x: Tensor) -> None:
    """F.pad gives the example batch size on fake tensors."""
    result = F.pad(x, (1, 1))
    found = at_any_batch_size(result, F.pad, (x, (1, 1)), {}, x.shape[0], SIZE)
    assert found.shape[0].node.expr == x.shape[0].node.expr
    assert found.shape[1] == 5


def test_what_is_right_stays_the_very_object(x: Tensor) -> None:
    result = torch.relu(x)
    assert at_any_batch_size(result, torch.relu, (x,), {}, x.shape[0], SIZE) is result


def test_a_view_is_not_replaced(x: Tensor) -> None:
    with pytest.raises(Untraceable, match="gives a view"):
        at_any_batch_size(x[:7], lambda x: x[: x.shape[0] - 1], (x,), {}, x.shape[0], SIZE)


def test_numbers_that_depend_on_values_are_refused(x: Tensor) -> None:
    def call(x: Tensor) -> tuple[Tensor, int]:
        return x, int(x.detach().abs().sum() * 1e6)

    with pytest.raises(Untraceable, match="depend on values"):
        on_data(call, x)
