"""lorascope: what a finetune taught a language model, read from the scalars of a rank-1 LoRA adapter.

The names below are the library's front door; they load on first use, so that `import lorascope` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorascope.adapter import Adapter
    from lorascope.attached import attach
    from lorascope.edits import add, clamp, gate, off, replace, scale
    from lorascope.generation import Sampling, generate
    from lorascope.models import load_model
    from lorascope.prepacked import prepacked_maps
    from lorascope.store import Store
    from lorascope.study import Study

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapter",
    "Sampling": "generation",
    "Store": "store",
    "Study": "study",
    "add": "edits",
    "attach": "attached",
    "clamp": "edits",
    "gate": "edits",
    "generate": "generation",
    "load_model": "models",
    "off": "edits",
    "prepacked_maps": "prepacked",
    "replace": "edits",
    "scale": "edits",
}
__all__ = [
    "Adapter",
    "Sampling",
    "Store",
    "Study",
    "add",
    "attach",
    "clamp",
    "gate",
    "generate",
    "load_model",
    "off",
    "prepacked_maps",
    "replace",
    "scale",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorascope' has no attribute {name!r}")
    return getattr(import_module(f"lorascope.{_HOMES[name]}"), name)
