"""The custom operators: torch.compile sees one call, and what would go wrong in silence raises.

The Triton operator passes the same checks in triton_cases.py.
"""

import pytest
import torch
from supcon_peers import CHOICES, OPTIONS, loss_and_gradient, random_batch
from torch import Tensor

from scpl_compile.kernels import supcon_chunked, supcon_loss


@pytest.mark.parametrize("options", [CHOICES[0], CHOICES[-1]])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_has_no_graph_break(options: dict[str, object], backend: str) -> None:
    torch._dynamo.reset()

    def step(features: Tensor, labels: Tensor, **_: object) -> Tensor:
        return supcon_loss(features * 2, labels, **options) * 3

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
    for batch in (24, 30):
        features, labels = random_batch(batch, 6, 5, torch.float32)
        expected = loss_and_gradient(step, features, labels)
        found = loss_and_gradient(compiled, features, labels)
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own check does
@pytest.mark.parametrize("options", [CHOICES[0], CHOICES[-1]])
def test_the_operator_is_what_torch_asks_of_one(options: dict[str, object]) -> None:
    """Schema, no aliases, the fake's shapes, autograd registered; static and dynamic shapes."""
    features, labels = random_batch(9, 4, 3, torch.float32)
    arguments = (*(options[k] for k in ("temperature", "divisor", "normalize", "reduction")), 4)
    torch.library.opcheck(
        torch.ops.scpl_compile.supcon_chunked, (features.requires_grad_(), labels, *arguments, True)
    )


def test_vmap_is_refused() -> None:
    features, labels = torch.randn(3, 8, 4), torch.randint(0, 3, (3, 8))
    with pytest.raises(RuntimeError, match="cannot be mapped by vmap.*reference"):
        torch.vmap(lambda f, y: supcon_chunked.supcon_chunked(f, y, **OPTIONS))(features, labels)


@pytest.mark.parametrize("options", [CHOICES[0], CHOICES[-1]])
def test_a_second_derivative_is_refused(options: dict[str, object]) -> None:
    features, labels = random_batch(8, 4, 2)
    loss = supcon_loss(features.requires_grad_(), labels, **options)
    with pytest.raises(RuntimeError, match="no second derivative.*create_graph.*reference"):
        torch.autograd.grad(loss.sum(), features, create_graph=True)
