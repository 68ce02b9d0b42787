"""The tree of errors, and the place that `context` puts in front of a message."""

import inspect

import pytest

from scpl_compile import errors
from scpl_compile.errors import CaptureError, MethodError, ScplError, context

CLASSES = [
    value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and name in errors.__all__
]


def test_every_error_is_a_scpl_error_and_stands_in_the_drawing() -> None:
    drawing = errors.__doc__ or ""
    assert len(CLASSES) == 13
    for error in CLASSES:
        assert issubclass(error, ScplError) and error.__name__ in drawing
        assert error is ScplError or error.__bases__ in (
            (ScplError,),
            (CaptureError,),
            (MethodError,),
        )
        assert error.__doc__


@pytest.mark.parametrize("kind", CLASSES)
def test_context_keeps_the_kind_and_puts_the_place_in_front(kind: type[ScplError]) -> None:
    with pytest.raises(kind) as caught, context("stage 2"), context("layer3"):
        raise kind("it is wrong")
    assert type(caught.value) is kind
    assert str(caught.value) == "stage 2: layer3: it is wrong"
    first = caught.value.__cause__
    assert first is not None and str(first) == "layer3: it is wrong"


def test_context_leaves_other_exceptions_and_values_alone() -> None:
    with pytest.raises(KeyError) as caught, context("stage 2"):
        raise KeyError("x")
    assert caught.value.args == ("x",)
    with context("stage 2"):
        value = 1
    assert value == 1
