"""How a stage computes its step: precision, memory format, clipping, accumulation."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scpl_compile.errors import MethodError

__all__ = ["AMP", "StepOptions"]

AMP = ("none", "bf16", "fp16")

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_WIRES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """What every stage does alike, whichever engine runs it.

    amp: "bf16" or "fp16": forward and evaluation under torch.autocast; "fp16" with a GradScaler
    of the stage's own. channels_last: 4-D weights, inputs and received tensors in that memory
    format. clip_norm: of all gradients of a stage together; 0: none. accumulate: the optimizer
    steps after every so many steps, by the mean of their gradients. wire_dtype: "bfloat16" or
    "float16": what float32 and float64 are rounded to before they cross a cut, gradients too; the
    reader gets float32 (here, so that all engines compute the same). "": nothing.

    Raises:
        MethodError: names what is wrong.
    """

    amp: str = "none"
    channels_last: bool = False
    clip_norm: float = 0.0
    accumulate: int = 1
    wire_dtype: str = ""

    def __post_init__(self) -> None:
        if self.wire_dtype not in ("", *_WIRES):
            raise MethodError(
                f"wire_dtype {self.wire_dtype!r} is not one of {', '.join(_WIRES)}, or empty"
            )
        if self.amp not in AMP:
            raise MethodError(f"amp {self.amp!r} is not one of {', '.join(AMP)}")
        if not self.clip_norm >= 0:
            raise MethodError(f"clip_norm is {self.clip_norm}; give at least 0 (0: no clipping)")
        if self.accumulate < 1:
            raise MethodError(f"accumulate is {self.accumulate}; give at least 1")

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """What the forward runs in.

        Without autocast's cache of weights: it is one for all threads and cleared by whichever
        leaves first, so that gradients of a weight used twice would depend on timing.
        """
        if self.amp == "none":
            return nullcontext()
        return torch.autocast(device.type, _DTYPES[self.amp], cache_enabled=False)

    def narrow(self, value: Tensor) -> Tensor:
        """`value` as it crosses a cut; differentiable. Integers, labels among them, as they are."""
        if self.wire_dtype and value.dtype in (torch.float32, torch.float64):
            return value.to(_WIRES[self.wire_dtype])
        return value

    def widen(self, value: Tensor) -> Tensor:
        """What has crossed a cut, as the reader takes it."""
        if self.wire_dtype and value.dtype == _WIRES[self.wire_dtype]:
            return value.float()
        return value

    def arrange(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """`values` in the memory format in which the stage computes.

        Not `contiguous`: of one channel both formats are the same memory, it would keep the strides
        of the other, and torch, which goes by them, would compute in that.
        """
        if not self.channels_last:
            return values
        return {
            name: value.to(memory_format=torch.channels_last)
            if value.ndim == 4 and value.is_floating_point()
            else value
            for name, value in values.items()
        }

    def arrange_module(self, module: nn.Module) -> None:
        """The same for its parameters, which stay the same objects.

        Module.to(memory_format=…) would refuse weights of 3-D convolutions.
        """
        if self.channels_last:
            for parameter in module.parameters():
                if parameter.ndim == 4 and parameter.is_floating_point():
                    parameter.data = parameter.data.to(memory_format=torch.channels_last)
