"""Whether code that asks for a truth only makes sure of it: `assert x`, `if not x: raise …`."""

import ast
import linecache
from collections.abc import Iterator
from types import FrameType

__all__ = ["claimed_answer"]


def claimed_answer(frame: FrameType) -> bool | None:
    """The answer with which the line that `frame` is at does not raise; None if it makes no claim.

    Of a compound condition (`a and not b`) any part may be what asks: all must need one answer.
    """
    statement = _statement(frame.f_code.co_filename, frame.f_lineno)
    if isinstance(statement, ast.Assert):
        answers = set(_answers(statement.test, True))
    elif isinstance(statement, ast.If) and isinstance(statement.body[-1], ast.Raise):
        answers = set(_answers(statement.test, False))
    else:
        return None
    return answers.pop() if len(answers) == 1 else None


def _statement(file: str, line: int) -> ast.stmt | None:
    """The assert or if whose condition is on that line of a file."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assert, ast.If)):
            if node.test.lineno <= line <= (node.test.end_lineno or line):
                return node
    return None


def _answers(test: ast.expr, wanted: bool) -> Iterator[bool | None]:
    """What every part of a condition must be for it to be `wanted`; None where that is open."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield from _answers(test.operand, not wanted)
    elif isinstance(test, ast.BoolOp):
        all_alike = isinstance(test.op, ast.And) is wanted
        for part in test.values:
            yield from _answers(part, wanted) if all_alike else (None,)
    elif isinstance(test, ast.IfExp):
        yield None
    else:
        yield wanted
