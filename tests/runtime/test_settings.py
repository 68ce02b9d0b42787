"""Keyword arguments as text; how scalars are read is in tests/sources/test_config.py."""

import pytest

from scpl_compile.runtime.settings import parse_scalars, parse_settings


def test_numbers_between_slashes_are_a_tuple() -> None:
    text = "betas=0.9/0.98,milestones=30/80,lr=1,path=a/b,date=1/b,half=1/,nesterov=true"
    assert parse_settings(text) == {
        "betas": (0.9, 0.98), "milestones": (30, 80), "lr": 1, "path": "a/b", "date": "1/b",
        "half": "1/", "nesterov": True,
    }  # fmt: skip
    assert parse_scalars("betas=0.9/0.98") == {"betas": "0.9/0.98"}


@pytest.mark.parametrize("read", [parse_scalars, parse_settings])
def test_a_wrong_piece_is_named(read: object) -> None:
    with pytest.raises(ValueError, match="'momentum' is not name=value"):
        read("lr=1,momentum")  # type: ignore[operator]
    with pytest.raises(ValueError, match="'a=2': a is given twice"):
        read("a=1,a=2")  # type: ignore[operator]
