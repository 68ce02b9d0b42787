"""The proxy of a model's input, whose shape is known but for the batch size."""

from typing import Any

from torch.fx import Node, Proxy, Tracer

__all__ = ["InputProxy"]


class InputProxy(Proxy):
    """Answers questions about its shape with ints, so that `assert t <= self.block_size` traces.

    Dimension 0 is the batch and stays symbolic.
    """

    def __init__(self, node: Node, tracer: Tracer, sample_shape: tuple[int, ...]) -> None:
        super().__init__(node, tracer)
        self._sample_shape = sample_shape

    @property
    def shape(self) -> tuple[Any, ...]:
        """(batch size as a proxy, the other sizes as ints)."""
        return (self.size(0), *self._sample_shape)

    @property
    def ndim(self) -> int:
        """Number of dimensions with the batch."""
        return len(self._sample_shape) + 1

    def dim(self) -> int:
        """Number of dimensions with the batch."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """Size of one dimension, or the whole shape."""
        if dim is None:
            return self.shape
        if dim % self.ndim == 0:
            return self.tracer.create_proxy("call_method", "size", (self, 0), {})
        return self._sample_shape[dim % self.ndim - 1]
