"""Models that are refused before anything is traced, each with what to give instead."""

from torch import Tensor, nn

from scpl_compile.errors import CaptureError

__all__ = ["check_usable"]


def check_usable(model: nn.Module) -> None:
    """Raises CaptureError for a wrapped model, one with nothing to train, or one not copyable."""
    if inner := _wrapped(model):
        raise CaptureError(
            f"the model is wrapped in {type(model).__name__}; give the module inside: {inner}"
        )
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        found = f"all {len(parameters)} parameters of" if parameters else "there are none in"
        frozen = " are frozen" if parameters else ""
        raise CaptureError(
            f"no parameter trains: {found} {type(model).__name__}{frozen}; give a model with "
            "parameters that require a gradient (requires_grad_(True))"
        )
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                raise CaptureError(_not_copyable(path, module, name))


def _wrapped(model: nn.Module) -> str:
    """How the module inside a wrapper is written, "" for any other model."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "model.module"
    # By name: importing torch._dynamo for its class would take a second.
    home, name = type(model).__module__, type(model).__qualname__
    return "model._orig_mod" if (home, name) == _COMPILED else ""


_COMPILED = ("torch._dynamo.eval_frame", "OptimizedModule")


def _not_copyable(path: str, module: nn.Module, name: str) -> str:
    """A tensor with a history cannot be copied with its module, so nothing could train a copy."""
    where = f"{path or 'the model'} ({type(module).__name__})"
    if f"{name}_g" in module._parameters and f"{name}_v" in module._parameters:
        return (
            f"{where} has a torch.nn.utils.weight_norm, which cannot be copied; use "
            "torch.nn.utils.parametrizations.weight_norm"
        )
    return (
        f"{where} keeps the result {name!r} of a computation with a gradient, which cannot be "
        f"copied; keep {name}.detach()"
    )
