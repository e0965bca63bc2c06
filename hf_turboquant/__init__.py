"""TurboQuantCache: a KV cache for Hugging Face models in 2-4 bits."""

__version__ = "0.1.0"

# Imported first: with an unsupported transformers, the other imports would fail with a confusing error.
from . import _supported, attention  # noqa: F401
from .cache import TurboQuantCache
from .config import TurboQuantConfig
from .generation import generate
from .handle import QuantizedStates
from .memory import MemoryReport

attention.register()

__all__ = ["MemoryReport", "QuantizedStates", "TurboQuantCache", "TurboQuantConfig", "generate"]
