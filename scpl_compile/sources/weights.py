"""Weights from a safetensors file, by the model's own names."""

from pathlib import Path

from torch import Tensor, nn

from scpl_compile.errors import ProgramError, SourceError
from scpl_compile.runtime.checkpoint import load_tensors

__all__ = ["load_weights"]


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a .safetensors file into `model`; the names must be the model's, all of them.

    A name may be missing where the model ties it to one that is there.

    Raises:
        SourceError: the file is missing or torn; a name is missing, unknown, or of another shape.
    """
    if path.suffix != ".safetensors":
        raise SourceError(
            f"weights {path} must be a .safetensors file (others are pickles, which run code); "
            "write it with safetensors.torch.save_file(model.state_dict(), …)"
        )
    try:
        tensors, _ = load_tensors(path)
    except ProgramError as error:
        raise SourceError(f"weights {error}") from error
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    given = {own[name].data_ptr() for name in tensors if name in own}
    missing = [n for n in own if n not in tensors and own[n].data_ptr() not in given]
    unexpected = [name for name in tensors if name not in own]
    facts = [
        f"{len(names)} {word} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for word, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if facts:
        raise SourceError(f"weights {path} are not this model's: {' and '.join(facts)}")
    for name, value in tensors.items():
        if value.shape != own[name].shape:
            raise SourceError(
                f"weights {path}: {name} is {tuple(value.shape)}, the model's is "
                f"{tuple(own[name].shape)}"
            )
    model.load_state_dict(tensors, strict=False)
