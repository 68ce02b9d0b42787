"""The text of the functions that build losses of one's own: one for each class.

A function loads the class when it is called: a file that is missing when stages.py is imported
would be told with a traceback.
"""

import re
from collections.abc import Mapping
from operator import attrgetter

from scpl_compile.emit.expressions import constant
from scpl_compile.emit.imports import RUNTIME, Imports
from scpl_compile.emit.layout import call_lines, plain
from scpl_compile.ir import LossSource, Plan

__all__ = ["builder_lines", "builder_names"]


def builder_names(plan: Plan) -> Mapping[LossSource, str]:
    """The function for every class of the user's own: "build_noisy" for Noisy."""
    names: dict[LossSource, str] = {}
    taken = {"build_model", "build_trainer"}
    for source in [loss.source for stage in plan.stages for loss in stage.losses]:
        if source is not None and source not in names:
            name = "build_" + re.sub(r"\W", "_", source.name).lower()
            while name in taken:
                name += "_"
            taken.add(name)
            names[source] = name
    return names


def builder_lines(source: LossSource, name: str, imports: Imports) -> list[str]:
    """The function `name`, which builds the class of `source`."""
    where = [
        constant(text, imports, attrgetter("name"))
        for text in (source.path, source.name, source.sha256)
    ]
    return [
        f"def {name}(**options: Any) -> Any:",
        f'    """The loss {plain(source.name, 50)} of your own, on the features of a stage."""',
        *call_lines(f"loss: Any = {imports.name(RUNTIME, 'load_callable')}", where, 4),
        "    return loss(**options)",
    ]
