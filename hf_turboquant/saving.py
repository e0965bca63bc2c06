"""Saving: a cache as a folder of one safetensors and one json file; no pickle, nothing half written or half read."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .snapshot import layer_state

FORMAT, FORMAT_VERSION = "hf_turboquant cache", 2
HEADER, TENSORS = "cache.json", "cache.safetensors"


def save(folder: str | Path, layers: list, about: dict) -> None:
    """
    Writes the layers to `folder`: to a temporary one beside it, which then takes its name.

    Args:
        folder (`str` or `Path`): new, empty, or a saved cache, which is replaced.
        layers (`list`): of a [`TurboQuantCache`].
        about (`dict`): what the json shall say of the cache itself.

    Raises:
        `ValueError`: `folder` holds something else, or a layer holds what cannot be saved. Nothing is written then.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {HEADER, TENSORS}):
        raise ValueError(
            f"`folder` must be new, empty or a saved cache, got {folder}, which holds something else. Name another."
        )
    if folder.exists() and any(folder.iterdir()):
        # raises unless it is ours
        _read_header(folder)
    tensors: dict[str, torch.Tensor] = {}
    states = [_encode(layer_state(layer), f"layers.{index}", tensors) for index, layer in enumerate(layers)]
    # the package imports this file before it knows its version
    from . import __version__

    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "hf_turboquant": __version__, **about}
    header["layers"] = states
    header["tensors"] = {name: _describe(tensor) for name, tensor in tensors.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
        new, old = Path(work, "new"), Path(work, "old")
        new.mkdir()
        save_file(tensors, new / TENSORS)
        header["tensors_sha256"] = _file_sha256(new / TENSORS)
        header["sha256"] = _sha256(header)
        (new / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
        # safetensors makes files that only their owner can read
        shutil.copymode(new / HEADER, new / TENSORS)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise


def read(folder: str | Path, device: torch.device) -> tuple[dict, Iterator[dict]]:
    """
    What the json says of the cache, and the states of its layers for `restore_layer`: they come to `device` singly.

    Raises:
        `ValueError`: `folder` is no saved cache, one of another format, or not as it was written.
    """
    folder = Path(folder)
    header = _read_header(folder)
    if header["format_version"] < FORMAT_VERSION:
        raise ValueError(
            f"The format of {folder} must be {FORMAT_VERSION}, got {header['format_version']}, as hf_turboquant "
            f"{header.get('hf_turboquant')} wrote it. Prefill the text again and save that, or install that release."
        )
    with refusing(folder):
        found = _file_sha256(folder / TENSORS)
        if found != header["tensors_sha256"]:
            raise ValueError(f"{TENSORS} must have the sha256 {header['tensors_sha256']}, got {found}")
        tensors = load_file(folder / TENSORS)
        if {name: _describe(tensor) for name, tensor in tensors.items()} != header["tensors"]:
            raise ValueError(f"{TENSORS} must hold the tensors that {HEADER} names, got others")
        return header, (_decode(state, tensors, device) for state in header["layers"])


@contextmanager
def refusing(folder: str | Path) -> Iterator[None]:
    """What wrong contents lead to becomes one error; a machine out of memory or without a device keeps its own."""
    try:
        yield
    except (ValueError, OSError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        got = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{folder} must be a folder as `save_pretrained` writes it: {got}. Save the cache again."
        ) from error


def _encode(tree, name: str, tensors: dict[str, torch.Tensor]):
    """`tree` as json; its tensors go to `tensors` by name."""
    if isinstance(tree, torch.Tensor):
        # a copy, because safetensors refuses tensors that share memory
        tensors[name] = tree.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        return {"$tensor": name}
    if isinstance(tree, dict):
        items = {key: _encode(value, f"{name}.{key}", tensors) for key, value in tree.items()}
        # json has no integers for keys
        return items if all(isinstance(key, str) for key in items) else {"$items": list(items.items())}
    if isinstance(tree, list):
        return [_encode(value, f"{name}.{index}", tensors) for index, value in enumerate(tree)]
    if isinstance(tree, torch.dtype):
        return {"$dtype": str(tree).removeprefix("torch.")}
    if isinstance(tree, torch.device):
        return {"$device": None}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise ValueError(f"`{name}` must be a tensor or a plain value to be saved, got {type(tree).__name__}.")


def _decode(tree, tensors: dict[str, torch.Tensor], device: torch.device):
    if isinstance(tree, list):
        return [_decode(value, tensors, device) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        # out of the file's memory, where tensors may begin at odd bytes
        return tensors[tree["$tensor"]].to(device, copy=True)
    if "$items" in tree:
        return {key: _decode(value, tensors, device) for key, value in tree["$items"]}
    if "$dtype" in tree:
        return getattr(torch, tree["$dtype"])
    if "$device" in tree:
        return device
    return {key: _decode(value, tensors, device) for key, value in tree.items()}


def _read_header(folder: Path) -> dict:
    with refusing(folder):
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        if header["format"] != FORMAT:
            raise ValueError(f"`format` must be {FORMAT!r}, got {header['format']!r}")
        newer = header["format_version"] > FORMAT_VERSION
    if newer:
        raise ValueError(
            f"The format of {folder} must be at most {FORMAT_VERSION}, got {header['format_version']}. Upgrade "
            f"hf_turboquant: it was written by {header.get('hf_turboquant')}."
        )
    with refusing(folder):
        if header["sha256"] != _sha256(header):
            raise ValueError(f"{HEADER} must be as it was written, got one that was changed")
    return header


def _describe(tensor: torch.Tensor) -> list:
    return [str(tensor.dtype), list(tensor.shape)]


def _sha256(header: dict) -> str:
    rest = {key: value for key, value in header.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
