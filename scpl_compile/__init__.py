"""scpl_compile: turn an existing PyTorch model into stages that train at the same time.

    import scpl_compile

    program = scpl_compile.compile_model(model, example_inputs, num_stages=2, num_classes=10)
    trainer = program.trainer(devices=["cpu", "cpu"], optimizer="adam", lr=1e-3)
    trainer.step(inputs, labels)

The names below load on first use: `import scpl_compile` and `scpl --help` import no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scpl_compile.errors import ScplError
from scpl_compile.version import __version__

if TYPE_CHECKING:
    from scpl_compile.api import Program, compile_model, plan_model
    from scpl_compile.cutting import Captures
    from scpl_compile.runtime.trainer import Trainer

__all__ = [
    "Captures",
    "Program",
    "ScplError",
    "Trainer",
    "__version__",
    "compile_model",
    "plan_model",
]

_HOMES = {
    "Captures": "scpl_compile.cutting",
    "Program": "scpl_compile.api",
    "compile_model": "scpl_compile.api",
    "plan_model": "scpl_compile.api",
    "Trainer": "scpl_compile.runtime.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'scpl_compile' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
