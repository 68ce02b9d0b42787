"""What a line of code needs in order not to raise."""

import sys
from collections.abc import Callable
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


def asserts_any(x: Asks) -> None:
    assert x or True


def asserts_mixed(x: Asks) -> None:
    assert True and not (not x and False)


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
        (asserts, True),
        (asserts_not, False),
        (asserts_all, True),
        (asserts_on_lines, True),
        (raises, False),
        (raises_not, True),
        (raises_any, False),
        (asserts_any, None),
        (asserts_mixed, None),
        (branches, None),
        (loops, None),
        (chooses, None),
    ],
)
def test_the_claim_of_a_line(code: Callable[[Asks], object], answer: bool | None) -> None:
    asked = Asks()
    code(asked)
    assert asked.answer is answer


def test_code_without_source_claims_nothing() -> None:
    asked = Asks()
    exec("assert x or True", {"x": asked})
    assert asked.answer is None
