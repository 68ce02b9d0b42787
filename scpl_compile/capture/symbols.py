"""The batch size as a symbol, and what depends on it as nodes of the graph."""

import operator
from collections.abc import Callable
from typing import Any

import sympy  # type: ignore[import-untyped]
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import (
    CleanDiv,
    FloatPow,
    FloatTrueDiv,
    FloorDiv,
    IntTrueDiv,
    Mod,
    PowByNatural,
    PythonMod,
    ToFloat,
)

from scpl_compile.capture.opening import Untraceable
from scpl_compile.capture.watch import unwatched

__all__ = ["BatchSymbols", "expression_nodes"]

_OPERATIONS = {
    FloorDiv: operator.floordiv,
    CleanDiv: operator.floordiv,
    Mod: operator.mod,
    PythonMod: operator.mod,
    sympy.Pow: operator.pow,
    PowByNatural: operator.pow,
    FloatPow: operator.pow,
    FloatTrueDiv: operator.truediv,
    IntTrueDiv: operator.truediv,
    ToFloat: float,
}


class BatchSymbols(ShapeEnv):
    """Torch's record of symbolic sizes, in which nothing is ever concluded about the batch size.

    Torch's own would go on, after a question such as `batch == 8`, with the number in place of the
    symbol. Here the question is answered for the example batch size and nothing is remembered;
    on_guess(question, fixes) is called, where `fixes` says whether only one batch size gives this
    answer.
    """

    def __init__(self, on_guess: Callable[[str, bool], None]) -> None:
        super().__init__(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        self._on_guess = on_guess

    def evaluate_expr(
        self, orig_expr: sympy.Basic, hint: Any = None, *args: Any, **kwargs: Any
    ) -> sympy.Basic:
        """The value of an expression, which it may or may not have at every batch size."""
        with unwatched(), self.suppress_guards():  # torch's own code logs: none of the user's
            value = super().evaluate_expr(orig_expr, hint, *args, **kwargs)
            is_known = self._maybe_evaluate_static(orig_expr) is not None
        if not is_known:
            fixes = bool(
                value.is_number
                or (isinstance(orig_expr, sympy.Eq) and value is sympy.true)
                or (isinstance(orig_expr, sympy.Ne) and value is sympy.false)
            )
            symbol = next(iter(orig_expr.free_symbols))
            self._on_guess(str(orig_expr.subs(symbol, sympy.Symbol("batch"))), fixes)
        return value


def expression_nodes(
    value: Any, batch: sympy.Symbol, size: Node, operation: Callable[..., Node]
) -> Node | int | float:
    """The nodes that compute a torch.SymInt or SymFloat which is an expression in `batch`.

    size: the node that gives the batch size. operation(function, *args) makes a node.

    Raises:
        Untraceable: another symbol, or an operation that is not one of + * / // % **.
    """

    def made(expression: Any) -> Any:
        if expression == batch:
            return size
        if isinstance(expression, sympy.Integer):
            return int(expression)
        if isinstance(expression, sympy.Float):
            return float(expression)
        function = _OPERATIONS.get(type(expression))
        if function is not None:
            return operation(function, *map(made, expression.args))
        if isinstance(expression, (sympy.Add, sympy.Mul)):
            function = operator.add if isinstance(expression, sympy.Add) else operator.mul
            constants = [part for part in expression.args if part.is_number]
            parts = [part for part in expression.args if not part.is_number] + constants
            total = made(parts[0])
            for part in parts[1:]:
                total = operation(function, total, made(part))
            return total
        raise Untraceable(f"computes {expression} from the batch size")

    return made(value.node.expr)  # type: ignore[no-any-return]
