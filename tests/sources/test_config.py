"""--config as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scpl_compile.errors import SourceError
from scpl_compile.sources import parse_config


def test_config_values_are_read_by_their_look():
    text = "a=1,b=2.5, c=true,d=text,e=-3,f=1e-3,g=False,h=,i=a=b,j=1_0,k=nan"
    read = parse_config(text)
    assert "".join(read) == "abcdefghijk"
    values = [1, 2.5, True, "text", -3, 1e-3, False, "", "a=b", "1_0", "nan"]
    assert [(type(value), value) for value in read.values()] == [(type(v), v) for v in values]
    assert parse_config("") == {}


@given(
    st.dictionaries(
        st.sampled_from(("a", "b2", "c_d")),
        st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
    )
)
def test_config_reads_back_numbers(config):
    text = ",".join(f"{name}={value}" for name, value in config.items())
    read = parse_config(text)
    assert read == config
    assert [type(value) for value in read.values()] == [type(value) for value in config.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "config 'a' is not name=value"),
        ("=3", "config '=3' is not name=value"),
        ("a b=3", "config 'a b=3' is not name=value"),
        ("a=1,a=2", "config 'a=2': a is given twice"),
    ],
)
def test_a_wrong_config_is_named(text, message):
    with pytest.raises(SourceError, match=message):
        parse_config(text)
