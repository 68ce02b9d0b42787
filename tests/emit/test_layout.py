"""Lines as `ruff format` lays them out, and text that is safe in a docstring."""

import ast

from hypothesis import given
from hypothesis import strategies as st

from scpl_compile.emit.layout import (
    WIDTH,
    call_lines,
    expression_lines,
    plain,
    signature_lines,
    tuple_lines,
)

LONG = ["a" * 30, "b" * 30, "c" * 30]
LONGER = [*LONG, "d" * 30]


def test_what_fits_is_one_line() -> None:
    assert call_lines("f", ["a", "b=1"], 4) == ["    f(a, b=1)"]
    assert call_lines("f", [], 0) == ["f()"]
    assert expression_lines("x = ", "a + b", 8) == ["        x = a + b"]
    assert tuple_lines("return ", ["a", "b"], "", 8) == ["        return a, b"]
    assert tuple_lines("", ["a"], " = self", 8) == ["        a = self"]
    assert signature_lines("f", ["x: T"], "T") == ["    def f(self, x: T) -> T:"]


def test_arguments_move_to_one_line_of_their_own_or_to_one_each() -> None:
    inner = ", ".join(LONG)
    assert call_lines("self.f", LONG, 2) == ["  self.f(", f"      {inner}", "  )"]
    assert call_lines("f", LONGER, 0) == ["f(", *(f"    {x}," for x in LONGER), ")"]


def test_a_list_that_is_too_long_folds_within_the_call() -> None:
    items = [*LONGER, "e" * 30]
    folded = ["    [", *(f"        {x}," for x in items)]
    assert call_lines("f", [("[", items, "]"), "1"], 0) == [
        "f(", *folded, "    ],", "    1,", ")",
    ]  # fmt: skip
    assert call_lines("f", [("[", items, "]")], 0) == ["f(", *folded, "    ]", ")"]
    assert call_lines("f", [("key=(", ["a", "b"], ")"), "1"], 0) == ["f(key=(a, b), 1)"]
    assert call_lines("f", [("[", ["a", "b"], "]"), *LONGER], 0)[1] == "    [a, b],"


def test_signatures_fold_alike() -> None:
    inner = ", ".join(["self", *LONG[:2]])
    long_result = "R" * 40
    assert signature_lines("f", LONG[:2], long_result) == [
        "    def f(",
        f"        {inner}",
        f"    ) -> {long_result}:",
    ]
    assert signature_lines("f", LONGER, "R") == [
        "    def f(",
        "        self,",
        *(f"        {x}," for x in LONGER),
        "    ) -> R:",
    ]


def test_tuples_and_expressions_get_parentheses() -> None:
    assert tuple_lines("return ", LONGER, "", 4) == [
        "    return (",
        *(f"        {x}," for x in LONGER),
        "    )",
    ]
    assert expression_lines("x = ", " + ".join(LONG), 8) == [
        "        x = (",
        f"            {' + '.join(LONG)}",
        "        )",
    ]


def test_a_line_of_exactly_the_width_is_not_folded() -> None:
    argument = "a" * (WIDTH - len("f()"))
    assert call_lines("f", [argument], 0) == [f"f({argument})"]
    assert len(call_lines("f", [argument + "a"], 0)) == 3


@given(st.text(), st.integers(min_value=2, max_value=60))
def test_plain_text_stays_in_a_docstring(text: str, width: int) -> None:
    safe = plain(text, width)
    assert len(safe) <= width
    (expression,) = ast.parse(f'"""{safe}."""').body
    assert isinstance(expression, ast.Expr) and isinstance(expression.value, ast.Constant)
    assert expression.value.value == f"{safe}."


def test_the_end_of_a_long_path_is_kept() -> None:
    assert plain("encoder.layers.11.mlp", 10) == "…rs.11.mlp"
    assert plain("layer1", 10) == "layer1"
    assert plain('x"""\n\\N', 20) == "x?????N"
