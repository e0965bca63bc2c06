"""The versions of transformers that this package was made for, and what they call things."""

import inspect
from importlib import metadata

# As in setup.cfg; a test compares them.
LOWEST, TOO_NEW = (5, 17), (6, 0)


def check_transformers(version: str) -> None:
    """
    Raises:
        `ImportError`: `version` is out of the range.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if not LOWEST <= (major, minor) < TOO_NEW:
        supported = ">={}.{},<{}".format(*LOWEST, TOO_NEW[0])
        raise ImportError(
            f"hf_turboquant needs transformers{supported}, got {version}. Run `pip install 'transformers{supported}'`, "
            "or look for a newer hf_turboquant."
        )


def cache_name(model) -> str:
    """
    The argument by which `model.forward` takes its cache: `cache` from transformers 5.24 on; before,
    `past_key_values` or, for state space models, `cache_params`. Any other name is lost among its other keywords.

    Raises:
        `ValueError`: the model takes no cache.
    """
    taken = inspect.signature(model.forward).parameters
    found = [name for name in ("cache", "past_key_values", "cache_params") if name in taken]
    if not found:
        raise ValueError(f"`model` must take a cache, got {type(model).__name__}, which does not. Take a decoder.")
    return found[0]


check_transformers(metadata.version("transformers"))
