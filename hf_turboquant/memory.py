"""MemoryReport: the bytes of a cache, counted from its tensors."""

from dataclasses import dataclass, fields

import torch

from .layer import TurboQuantLayer


@dataclass(frozen=True)
class MemoryReport:
    """
    Bytes of a cache, every tensor counted.

    Args:
        codes_bytes (`int`): packed codes and sketch signs of the tokens held.
        scales_bytes (`int`): scales and residual norms of the tokens held.
        exact_bytes (`int`): sinks and recent window.
        slack_bytes (`int`): allocated for later tokens.
        constants_bytes (`int`): rotations, sketches and codebooks; independent of the sequence length.
        other_bytes (`int`): layers that are not compressed.
        full_bytes (`int`): what a `DynamicCache` holds for the same tokens.
    """

    codes_bytes: int = 0
    scales_bytes: int = 0
    exact_bytes: int = 0
    slack_bytes: int = 0
    constants_bytes: int = 0
    other_bytes: int = 0
    full_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Everything the cache holds."""
        return sum(getattr(self, field.name) for field in fields(self)) - self.full_bytes

    @property
    def compression_ratio(self) -> float:
        """Bytes in full precision / bytes stored; 1 for an empty cache."""
        return self.full_bytes / self.total_bytes if self.total_bytes else 1.0

    def __add__(self, other: "MemoryReport") -> "MemoryReport":
        return MemoryReport(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __str__(self) -> str:
        parts = ", ".join(
            f"{field.name.removesuffix('_bytes')} {readable(getattr(self, field.name))}"
            for field in fields(self)
            if field.name != "full_bytes" and getattr(self, field.name)
        )
        return (
            f"{readable(self.total_bytes)} in place of {readable(self.full_bytes)}: "
            f"{self.compression_ratio:.2f} times smaller ({parts or 'empty'})"
        )


def layer_memory(layer) -> MemoryReport:
    """The report of one layer of a cache, of any kind."""
    # A compressed layer has its tokens in buffers. Its own tensors are recurrent states and tokens not yet stored; the
    # arena and what conditioning knows are left out.
    known = "arena", "found", "provisional", "query_energy", "valid"
    own = {name: value for name, value in vars(layer).items() if name not in known}
    held = _tensor_bytes(own)
    if not isinstance(layer, TurboQuantLayer) or not layer.is_initialized:
        return MemoryReport(other_bytes=held, full_bytes=held)
    layer.measure()
    codes = scales = 0
    for buffer in layer.codes.values():
        used = buffer.used_nbytes
        scale_bytes = sum(t.nbytes for name, t in buffer.tensors.items() if "plane" not in name)
        scale_bytes = scale_bytes * buffer.length // buffer.capacity if buffer.capacity else 0
        codes, scales = codes + used - scale_bytes, scales + scale_bytes
    token_bytes = sum(
        tensor.shape[0] * tensor.shape[1] * tensor.shape[3] * tensor.element_size()
        for tensor in layer.exact.tensors.values()
    )
    exact = token_bytes * (layer.length - layer.codes["keys"].length)
    return MemoryReport(
        codes_bytes=codes,
        scales_bytes=scales,
        exact_bytes=exact,
        slack_bytes=layer.nbytes - codes - scales - exact,
        constants_bytes=sum(quantizer.nbytes for quantizer in layer.quantizers.values()),
        other_bytes=held,
        full_bytes=token_bytes * layer.length + held,
    )


def _tensor_bytes(tree) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        return sum(_tensor_bytes(value) for value in tree.values())
    return 0


def readable(count: int) -> str:
    """`168_100_000` -> `"168 MB"`."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
