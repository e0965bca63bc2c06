"""SplitQuantizer: bits between two whole numbers, from two quantizers per head."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .config import TurboQuantConfig
from .packing import BLOCK
from .quantizer import Quantizer
from .storage import TokenBuffer


@dataclass(frozen=True, eq=False)
class SplitQuantizer:
    """
    Bits between two whole numbers (TurboQuant, section 4.3): of nbits = b + f, the f · head_dim channels of a head that
    carry most energy get b + 1 bits and the others b. Each part has a rotation, a codebook of its own dimension and
    scales of its own:

        z = A (x - μ), A = diag(A₁, A₂) P, where P puts the outlier channels of the head first

    and z₁ and z₂ are stored as [`Quantizer`] says. A vector takes exactly nbits · head_dim bits for codes and sketch,
    and two scales in place of one (four in place of two with `"qjl"`).

    Args:
        role (`str`), nbits (`float`): as for [`Quantizer`].
        parts (`tuple[Quantizer, Quantizer]`): of the outlier channels, and of the rest.
        transform, dual (`torch.Tensor`, fp32), mean, scale (`torch.Tensor`, *optional*): as for [`Quantizer`].
        channels (`torch.Tensor` of shape `[num_key_value_heads, head_dim]`, *optional*): P, the outlier channels first;
            `None` until the first tokens say which those are.
    """

    role: str
    nbits: float
    parts: tuple[Quantizer, Quantizer]
    transform: torch.Tensor
    dual: torch.Tensor
    mean: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    channels: torch.Tensor | None = None

    def __deepcopy__(self, memo) -> "SplitQuantizer":
        return self

    @property
    def head_dim(self) -> int:
        return self.transform.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the constants, those that are one tensor counted once."""
        tensors = {id(t): t.nbytes for t in self.__dict__.values() if isinstance(t, torch.Tensor)}
        return sum(tensors.values()) + sum(part.nbytes for part in self.parts)

    def new_buffer(self, batch: int, heads: int) -> TokenBuffer:
        """An empty buffer for the codes and scales of both parts."""
        shapes = {}
        for part in self.parts:
            shapes |= part.buffer_shapes()
        return TokenBuffer(shapes, BLOCK, batch, heads, self.transform.device)

    def choose(self, states: torch.Tensor, valid: torch.Tensor | None) -> "SplitQuantizer":
        """
        Takes the channels with most energy, centred and scaled, for the outliers.

        Args:
            states (`torch.Tensor`): of shape `[batch, num_key_value_heads, tokens, head_dim]`.
            valid (`torch.Tensor`, *optional*): boolean, of shape `[batch, tokens]`; false for padding.
        """
        x = states.float()
        x = x if self.mean is None else x - self.mean
        x = x if self.scale is None else x * self.scale
        energy = x.square() if valid is None else torch.where(valid[:, None, :, None], x.square(), 0)
        # a broken token must not decide by itself
        ranks = energy.nan_to_num(posinf=0).sum((0, 2)).argsort(dim=-1, descending=True, stable=True)
        outliers, others = ranks.split([part.head_dim for part in self.parts], dim=-1)
        return self.with_channels(torch.cat([outliers.sort(dim=-1).values, others.sort(dim=-1).values], dim=-1))

    def with_channels(self, channels: torch.Tensor) -> "SplitQuantizer":
        """The same quantizer with P = `channels`; it has none yet."""
        # column c of A is the column of diag(A₁, A₂) that P sends channel c to
        transform = self.transform[0][:, channels.argsort(dim=-1)].movedim(1, 0).contiguous()
        return replace(self, transform=transform, dual=transform, channels=channels)


def create_quantizer(
    config: TurboQuantConfig, role: str, layer_idx: int, head_dim: int, device: torch.device
) -> Quantizer | SplitQuantizer:
    """
    The quantizer of one role of one layer, see [`Quantizer.create`]; two in one where its bits are not a whole number.

    Raises:
        `ValueError`: a part would be under 16 channels or not a multiple of 8.
    """
    nbits = config.key_bits if role == "keys" else config.value_bits
    if nbits == int(nbits):
        return Quantizer.create(config, role, layer_idx, head_dim, device)
    return _create_split(config, role, nbits, layer_idx, head_dim, torch.device(device))


@lru_cache(maxsize=1024)
def _create_split(config, role, nbits, layer_idx, head_dim, device) -> SplitQuantizer:
    outliers = int((nbits - int(nbits)) * head_dim)
    dims = outliers, head_dim - outliers
    if min(dims) < 16 or any(dim % 8 for dim in dims):
        raise ValueError(
            f"{nbits} bits must split `head_dim` into parts of at least 16 channels, multiples of 8; got {dims} of "
            f"{head_dim}. Use whole bits, or half ones."
        )
    parts = tuple(
        Quantizer.create(
            replace(config, nbits=bits, key_bits=bits, value_bits=bits), role, layer_idx, dim, device, part
        )
        for part, (bits, dim) in enumerate(zip((int(nbits) + 1, int(nbits)), dims, strict=True))
    )
    with torch.inference_mode(False):
        transform = torch.block_diag(*(part.transform[0] for part in parts))[None]
    return SplitQuantizer(role, nbits, parts, transform, transform)
