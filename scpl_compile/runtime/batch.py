"""What is refused before a stage sees a batch, on the caller's side and without a device's help.

A plan knows the name, dtype and number of dimensions of every input. Which of the sizes behind the
batch are free (the length of a text, the side of an image before pooling) it does not know, so
sizes are left to the model.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scpl_compile.errors import DataError, MethodError
from scpl_compile.ir import InputSpec, Plan
from scpl_compile.runtime.labels import check_labels

__all__ = [
    "Inputs",
    "check_outside",
    "check_trainable",
    "labelled",
    "named_inputs",
    "num_samples",
]

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

_REMEDIES = {torch.float32: ".float()", torch.int64: ".long()", torch.bool: ".bool()"}


def named_inputs(specs: Sequence[InputSpec], inputs: Inputs) -> dict[str, Tensor]:
    """`inputs` by name: one tensor, a sequence in the order of `specs`, or a mapping; batch first.

    Raises:
        DataError: other inputs than those of `specs`; no tensor, another dtype or number of
            dimensions; batches of different sizes.
    """
    names = [spec.name for spec in specs]
    values: dict[str, Any]
    if isinstance(inputs, Mapping):
        values = dict(inputs)
    elif isinstance(inputs, (list, tuple)):
        if len(inputs) != len(names):
            raise DataError(f"the model takes {len(names)} inputs, not {len(inputs)}")
        values = dict(zip(names, inputs, strict=True))
    else:
        if len(names) != 1:
            raise DataError(f"the model takes {len(names)} inputs, not 1")
        values = {names[0]: inputs}
    if values.keys() != set(names):
        raise DataError(f"the model takes the inputs {names}, not {sorted(values)}")
    for spec in specs:
        _check_input(spec, values[spec.name])
    sizes = {name: value.shape[0] for name, value in values.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"the inputs' batch sizes differ: {sizes}")
    return values


def _check_input(spec: InputSpec, value: object) -> None:
    if not isinstance(value, Tensor):
        how = "torch.from_numpy(x)" if type(value).__module__ == "numpy" else "torch.as_tensor(x)"
        kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
        raise DataError(f"input {spec.name!r} is a {kind}; give a tensor: {how}")
    if value.ndim != 1 + len(spec.shape):
        shape = ", ".join(map(str, value.shape[1:]))
        raise DataError(
            f"input {spec.name!r} has the shape (batch, {shape}); "
            f"the program was compiled for (batch, {', '.join(map(str, spec.shape))})"
        )
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if value.dtype != dtype:
        remedy = _REMEDIES.get(dtype, f".to({dtype})")
        raise DataError(
            f"input {spec.name!r} is {value.dtype}; the program was compiled for {dtype}: give it "
            f"as x{remedy}"
        )


def num_samples(values: Mapping[str, Tensor]) -> int:
    """Samples in a batch of inputs, which come batch first."""
    return next(iter(values.values())).shape[0]


def labelled(plan: Plan, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs by name and labels of a batch to evaluate on: with .inputs and .labels, or a pair.

    Raises:
        DataError: as `named_inputs` and `check_labels`; there is not one label for each sample.
    """
    inputs, labels = (batch.inputs, batch.labels) if hasattr(batch, "labels") else batch
    values = named_inputs(plan.inputs, inputs)
    count = num_samples(values)
    labels, _ = check_labels(labels, count, plan.num_classes, plan.task)
    if len(labels) != count:
        raise DataError(f"{count} samples have {len(labels)} labels")
    return values, labels


def check_trainable(values: Mapping[str, Tensor]) -> None:
    """Raises DataError where autograd would refuse one of `values`."""
    for name, value in values.items():
        if value.is_inference():
            raise DataError(
                f"{name!r} was made in torch.inference_mode(), where nothing can be trained on; "
                "make it outside (torch.no_grad() does no harm), or pass its clone()"
            )


def check_outside(devices: Iterable[torch.device]) -> None:
    """Raises MethodError inside torch.autocast: it is per thread, and stages have their own."""
    for kind in sorted({device.type for device in devices}):
        if torch.is_autocast_enabled(kind):
            raise MethodError(
                f"torch.autocast({kind!r}) does not reach the stages' workers; leave it off around "
                "step, and give the trainer amp='bf16'"
            )
