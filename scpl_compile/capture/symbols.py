"""The batch size, and numbers that depend on data, as symbols; what is reckoned with them as nodes
of the graph.
"""

import operator
from collections.abc import Callable
from typing import Any

import sympy  # type: ignore[import-untyped]
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
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

__all__ = ["BatchSymbols", "data_symbols", "expression_nodes"]

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
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
    sympy.Lt: operator.lt,
    sympy.Le: operator.le,
    sympy.Gt: operator.gt,
    sympy.Ge: operator.ge,
}
_EXAMPLE = sympy.Integer(8)
"""What a number that depends on data is taken to be where torch's own code must know it."""


class BatchSymbols(ShapeEnv):
    """Torch's record of symbolic sizes, in which nothing is ever concluded about a symbol.

    Torch's own would go on, after a question such as `batch == 8`, with the number in place of the
    symbol. Here the question is answered for the example batch size and nothing is remembered;
    on_guess(question, fixes) is called, where `fixes` says whether only one batch size gives this
    answer.

    follows_data: numbers and sizes that depend on data (`lengths.max().item()`, `x[mask]`) become
    symbols too, instead of raising. on_data(expression, is_claimed) answers questions about these,
    None for an example's answer; is_claimed: torch._check says that the answer is yes.
    """

    def __init__(
        self,
        on_guess: Callable[[str, bool], None],
        on_data: Callable[[Any, bool], bool | None] = lambda question, is_claimed: None,
    ) -> None:
        super().__init__()
        self._on_guess = on_guess
        self._on_data = on_data
        self.follows_data = False

    @property
    def allow_scalar_outputs(self) -> bool:
        return self.follows_data

    @property
    def allow_dynamic_output_shape_ops(self) -> bool:
        return self.follows_data

    def create_unbacked_symint(self, *args: Any, **kwargs: Any) -> SymInt:
        """A number that depends on data."""
        value = super().create_unbacked_symint(*args, **kwargs)
        self.real_tensor_prop_unbacked_vals[value.node.expr] = _EXAMPLE
        return value

    def create_unbacked_symfloat(self) -> SymFloat:
        """A number that depends on data."""
        value = super().create_unbacked_symfloat()
        self.real_tensor_prop_unbacked_vals[value.node.expr] = sympy.Float(_EXAMPLE)
        return value

    def create_unbacked_symbool(self) -> SymBool:
        """A truth that depends on data."""
        value = super().create_unbacked_symbool()
        self.real_tensor_prop_unbacked_vals[value.node.expr.args[0]] = sympy.Integer(1)
        return value

    def guard_or_defer_runtime_assert(  # type: ignore[override]  # there in a cache
        self, orig_expr: Any, *args: Any, **kwargs: Any
    ) -> bool:
        """What torch._check asks."""
        if not free_unbacked_symbols(orig_expr):
            return super().guard_or_defer_runtime_assert(orig_expr, *args, **kwargs)
        return self._on_data(orig_expr, True) is not False

    def evaluate_expr(
        self, orig_expr: sympy.Basic, hint: Any = None, *args: Any, **kwargs: Any
    ) -> sympy.Basic:
        """The value of an expression, which it may or may not have at every batch size."""
        if free_unbacked_symbols(orig_expr):
            return self._evaluate_data(orig_expr, hint, *args, **kwargs)
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

    def _evaluate_data(
        self, expression: Any, hint: Any, *args: Any, fallback_value: Any = None, **kwargs: Any
    ) -> sympy.Basic:
        with unwatched():
            known = self._maybe_evaluate_static(expression)
        if known is not None:
            return known
        answer = self._on_data(expression, False)
        if answer is not None:
            return sympy.sympify(answer)
        if fallback_value is not None:
            return sympy.sympify(fallback_value)
        values = self.real_tensor_prop_unbacked_vals | self.backed_var_to_val
        return expression.xreplace(values)


def data_symbols(value: Any) -> set[sympy.Symbol]:
    """The symbols of numbers that depend on data in a tensor's sizes, or in a symbolic number."""
    is_symbolic = isinstance(value, (Tensor, SymInt, SymFloat, SymBool))
    return set(free_unbacked_symbols(value)) if is_symbolic else set()


def expression_nodes(
    expression: Any, leaf: Callable[[sympy.Symbol], Node], operation: Callable[..., Node]
) -> Node | int | float:
    """The nodes that compute a sympy expression, as torch's SymInt and its kin have in `node.expr`.

    leaf: gives the node of a symbol. operation(function, *args) makes a node.

    Raises:
        Untraceable: an operation that is none of + * / // % ** and comparisons.
    """

    def made(expression: Any) -> Any:
        if isinstance(expression, sympy.Symbol):
            return leaf(expression)
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

    return made(expression)  # type: ignore[no-any-return]
