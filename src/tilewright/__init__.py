"""Tilewright compiles an existing Hugging Face transformer into Triton kernels and runs them.

Nothing heavy is imported here: Triton imports ``tilewright.codegen.cpu`` inside its own import (entry
point ``triton.backends``), and ``import tilewright`` alone must stay cheap. The public names are
resolved on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright.driver.compile import compile as compile
    from tilewright.driver.compiled import CompiledModel as CompiledModel

__version__ = "0.1.0"

_PUBLIC = {
    "CompiledModel": "tilewright.driver.compiled",
    "compile": "tilewright.driver.compile",
    "errors": "tilewright.errors",
    "known_memory": "tilewright.codegen.cpu.launch_memory",
    "ops": "tilewright.ops",
    "prepare": "tilewright.codegen.cpu.prepare",
    "settings": "tilewright.settings",
}

__all__ = ["CompiledModel", "__version__", "compile", "errors", "known_memory", "ops", "prepare", "settings"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tilewright' has no attribute {name!r}; public names: {', '.join(__all__)}")
    module = import_module(_PUBLIC[name])
    return getattr(module, name, module)


def __dir__() -> list[str]:
    return __all__
