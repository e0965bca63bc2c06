"""The versions of transformers that this package was made for."""

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


check_transformers(metadata.version("transformers"))
