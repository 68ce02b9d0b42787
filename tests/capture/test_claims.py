"""What a line of code needs in order not to raise."""

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest

from scpl_compile.capture.claims import claimed_answer


class Asks:
    """Something whose truth is asked for; remembers what the line that asked claims."""

    def __init__(self) -> None:
        self.answer: bool | None = None

    def __bool__(self) -> bool:
        frame = sys._getframe(1)
        assert isinstance(frame, FrameType)
        self.answer = claimed_answer(frame)
        return bool(self.answer)


def asserts(x: Asks) -> None:
    assert x, "no"


def asserts_not(x: Asks) -> None:
    assert not x


def asserts_all(x: Asks) -> None:
    assert len("ab") == 2 and x


def asserts_on_lines(x: Asks) -> None:
    assert x, "no"


def raises(x: Asks) -> None:
    if x:
        message = "no"
        raise ValueError(message)


def raises_not(x: Asks) -> None:
    if not x:
        raise ValueError("no")


def raises_any(x: Asks) -> None:
    if x or len("a") > 1:
        raise ValueError("no")


def raises_mixed(x: Asks) -> None:
    if len("a") > 1 or not x:
        raise ValueError("no")


def raises_both(x: Asks) -> None:
    if x and len("a") == 1:
        raise ValueError("no")


def raises_among(x: Asks) -> None:
    if any(x for _ in "a"):
        raise ValueError("no")


def raises_converted(x: Asks) -> None:
    if bool(x) is True:
        raise ValueError("no")


def raises_or_returns(x: Asks) -> None:
    if x:
        if len("a") == 1:
            return
        raise ValueError("no")


def raises_and_catches(x: Asks) -> None:
    try:
        if x:
            raise ValueError("no")
    except ValueError:
        pass


def branches_beside_a_claim(x: Asks) -> None:
    if len("a") > 1:
        raise ValueError("no")  # noqa: E701
    _ = 1 if x else 2


def branches(x: Asks) -> int:
    if x:
        return 1
    return 2


def loops(x: Asks) -> None:
    while x:
        raise ValueError("no")


def chooses(x: Asks) -> int:
    return 1 if x else 2


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        (raises, False),
        (raises_not, True),
        (raises_any, False),
        (raises_mixed, True),
        (raises_both, None),
        (raises_among, None),
        (raises_converted, None),
        (raises_or_returns, None),
        (raises_and_catches, None),
        (branches_beside_a_claim, None),
        (branches, None),
        (loops, None),
        (chooses, None),
    ],
)
def test_the_claim_of_a_line(code: Callable[[Asks], object], answer: bool | None) -> None:
    asked = Asks()
    with suppress(ValueError):
        code(asked)
    assert asked.answer is answer


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("assert x, 'no'", True),
        ("assert not x", False),
        ("assert len('ab') == 2 and x", True),
        ("assert (\n    x\n), 'no'", True),
        ("assert x or True", None),
        ("assert True and not (not x and False)", None),
        ("assert bool(x) in (True, False)", None),
        ("assert max(int(bool(x)), 1)", None),
        ("assert 1; y = 1 if x else 2", None),
    ],
)
def test_the_claim_of_an_assert(code: str, answer: bool | None, tmp_path: Path) -> None:
    """In a file of its own, since pytest rewrites the asserts of this one."""
    file = tmp_path / "asserting.py"
    file.write_text(code)
    asked = Asks()
    with suppress(AssertionError):
        exec(compile(code, str(file), "exec"), {"x": asked})
    assert asked.answer is answer


def test_code_without_source_claims_nothing() -> None:
    asked = Asks()
    exec("assert x or True", {"x": asked})
    assert asked.answer is None
