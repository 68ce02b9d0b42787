"""How an implementation becomes a loss: opaque to torch.compile, differentiable once.

Two pure functions become two operators::

    forward(features, labels, *options)                      -> (loss, *saved)
    backward(grad_loss, features, labels, *saved, *options)  -> gradient of the features

A compiler, a transform or a mode sees the operators. Plain eager calls go round them: their
dispatch would cost a small batch a fifth of its time.

A second derivative and vmap raise: torch would else go on and give wrong numbers or no gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

__all__ = ["differentiable"]

LIBRARY = library.Library("scpl_compile", "FRAGMENT")


def differentiable(
    name: str,
    *,
    forward: Callable[..., tuple[Tensor, ...]],
    forward_fake: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., Tensor],
) -> Callable[..., Tensor]:
    """(features, labels, *options) -> loss; and the operator scpl_compile::NAME, which gives all.

    The schemas come from the annotations of the functions. forward_fake: shapes and dtypes of what
    `forward` returns, without data.
    """
    forward_op = _define(name, forward, forward_fake)
    backward_op = _define(f"{name}_backward", backward, _like_features)

    class Traced(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, features: Tensor, labels: Tensor, *options: object
        ) -> tuple[Tensor, ...]:
            with torch._C._AutoDispatchBelowAutograd():
                output: tuple[Tensor, ...] = forward_op(features, labels, *options)
            ctx.set_materialize_grads(False)  # zeros as large as everything saved
            ctx.mark_non_differentiable(*output[1:])
            ctx.save_for_backward(features, labels, *output[1:])
            ctx.options = options
            return output

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
            if grad_loss is None:
                return (None,) * (2 + len(ctx.options))
            return _gradients(ctx, grad_loss, backward, backward_op)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, features: Tensor, labels: Tensor, *options: object) -> Tensor:
            loss, *saved = forward(features, labels, *options)
            ctx.save_for_backward(features, labels, *saved)
            ctx.options = options
            return loss

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
            return _gradients(ctx, grad_loss, backward, backward_op)

    def loss(features: Tensor, labels: Tensor, *options: object) -> Tensor:
        if torch.compiler.is_compiling() or _is_watched(features):
            first: Tensor = forward_op(features, labels, *options)[0]
            return first
        value: Tensor = Eager.apply(features, labels, *options)
        return value

    LIBRARY.impl(name, Traced.apply, "Autograd")
    # Its context is set up only where a gradient of the gradient could be asked for.
    library.register_autograd(
        backward_op, _refuse_derivative, setup_context=_refuse_derivative, lib=LIBRARY
    )  # fmt: skip
    library.register_vmap(forward_op, _refuse_vmap, lib=LIBRARY)
    library.register_vmap(backward_op, _refuse_vmap, lib=LIBRARY)
    return loss


def _is_watched(features: Tensor) -> bool:
    """Whether a transform (vmap, grad), a mode or a tensor of another type wants the operator."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(features) not in (Tensor, torch.nn.Parameter)
    )


def _gradients(
    ctx: Any, grad_loss: Tensor, backward: Callable[..., Tensor], backward_op: Callable[..., Tensor]
) -> tuple[Tensor | None, ...]:
    """What the backward of both functions returns."""
    if torch.is_grad_enabled():
        _refuse_derivative()
    run = backward_op if _is_watched(grad_loss) else backward
    with torch._C._AutoDispatchBelowAutograd():
        grad = run(grad_loss, *ctx.saved_tensors, *ctx.options)
    return grad, *(None for _ in range(1 + len(ctx.options)))


def _refuse_derivative(*_: object, **__: object) -> None:
    raise RuntimeError(
        "supcon_loss has no second derivative: call backward without create_graph=True, or use "
        "impl='reference'"
    )


def _refuse_vmap(*_: object, **__: object) -> None:
    raise RuntimeError(
        "supcon_loss cannot be mapped by vmap: call it once for each batch, or use impl='reference'"
    )


def _define(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator that runs `function` on every device.

    Not `torch.library.custom_op`: its checks at every call cost a small batch a third of its time.
    """
    LIBRARY.define(name + library.infer_schema(function, mutates_args=()))
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    library.register_fake(f"{LIBRARY.ns}::{name}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops, LIBRARY.ns), name).default


def _like_features(grad_loss: Tensor, features: Tensor, *_: object) -> Tensor:
    return features.new_empty(features.shape)
