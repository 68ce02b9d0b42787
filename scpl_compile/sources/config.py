"""`--config`: keyword arguments of a constructor, as text."""

from scpl_compile.errors import SourceError
from scpl_compile.ir import Scalar
from scpl_compile.runtime.settings import parse_scalars

__all__ = ["parse_config"]


def parse_config(text: str) -> dict[str, Scalar]:
    """`a=1,b=2.5,c=true,d=text` as {"a": 1, "b": 2.5, "c": True, "d": "text"}.

    Raises:
        SourceError: names the piece that is wrong.
    """
    try:
        return parse_scalars(text)
    except ValueError as error:
        raise SourceError(f"config {error}, as in width=64,norm=true") from error
