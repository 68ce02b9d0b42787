"""Whether code that asks for a truth only makes sure of it: `assert x`, `if not x: raise …`."""

import ast
import dis
import linecache
from collections.abc import Iterator
from types import CodeType, FrameType

__all__ = ["claimed_answer"]

Place = tuple[int, int, int, int]
"""First line, first column, last line, last column."""


def claimed_answer(frame: FrameType) -> bool | None:
    """The answer with which what `frame` asks does not raise; None if it makes no claim.

    The question must be a whole operand of the condition (of `a and not b`: a, or b), asked by the
    branch itself: what `any(…)` or `x in y` asks on the way decides nothing alone. An exception
    that the function itself may catch is no claim.
    """
    place = _asking_place(frame.f_code, frame.f_lasti)
    if place is None:
        return None
    try:
        tree = ast.parse("".join(linecache.getlines(frame.f_code.co_filename)))
    except SyntaxError:
        return None
    if any(_catches(node, place[0]) for node in ast.walk(tree)):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            answers = dict(_answers(node.test, True))
        elif isinstance(node, ast.If) and _only_raises(node.body):
            answers = dict(_answers(node.test, False))
        else:
            continue
        if place in answers:
            return answers[place]
    return None


def _asking_place(code: CodeType, offset: int) -> Place | None:
    """Where the operand stands by whose truth the instruction at `offset` branches.

    The branch itself has the place of its statement; what comes before it makes the operand.
    """
    before, branch = None, None
    for instruction in dis.get_instructions(code):
        if instruction.offset == offset:
            branch = instruction
            break
        before = instruction
    if branch is None or not branch.opname.startswith(("POP_JUMP", "TO_BOOL")):
        return None
    where = before.positions if before else None
    if where is None or where.lineno is None or where.col_offset is None:
        return None
    if where.end_lineno is None or where.end_col_offset is None:
        return None
    return where.lineno, where.col_offset, where.end_lineno, where.end_col_offset


def _catches(node: ast.AST, line: int) -> bool:
    """Whether `node` is a try that may catch what is raised at that line."""
    if not isinstance(node, ast.Try) or not node.handlers:
        return False
    return node.body[0].lineno <= line <= (node.body[-1].end_lineno or line)


def _only_raises(body: list[ast.stmt]) -> bool:
    simple = all(isinstance(statement, (ast.Assign, ast.Expr)) for statement in body[:-1])
    return simple and isinstance(body[-1], ast.Raise)


def _answers(test: ast.expr, wanted: bool) -> Iterator[tuple[Place, bool | None]]:
    """What every operand of a condition must be for it to be `wanted`; None where that is open."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield from _answers(test.operand, not wanted)
    elif isinstance(test, ast.BoolOp):
        if isinstance(test.op, ast.And) is wanted:  # else one operand of them is enough
            for part in test.values:
                yield from _answers(part, wanted)
    elif isinstance(test, ast.Compare) and len(test.ops) > 1 and not wanted:
        return  # so with a chain: a < b < c
    else:
        last_line, last_column = test.end_lineno or 0, test.end_col_offset or 0
        yield (test.lineno, test.col_offset, last_line, last_column), wanted
