"""twinlora: LoRA and QLoRA fine-tuning, planned, trained, compared and served, with measured evidence.

The names below are those of `twinlora.api`, imported on first use: `import twinlora` alone costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinlora.api import PackedCollator, attach, encode, finetune, generate, load, without_adapters

__all__ = ["PackedCollator", "attach", "encode", "finetune", "generate", "load", "without_adapters"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'twinlora' has no attribute {name!r}; it has {', '.join(__all__)}")
    from twinlora import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
