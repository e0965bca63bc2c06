"""
Packs codes into bytes and unpacks them, exactly and without wasted bits.

A code of b bits is split into fields of 8, 4, 2 and 1 bits, widest first (3 = 2 + 1); the lowest bits of the code are
in the widest field. Fields of one width form a plane. Tokens come in blocks of 128. Within a block, keys are stored
token by token (scores read a key's row) and values dimension by dimension along the tokens (the weighted sum reads a
dimension's row). Shapes of one block, D = head_dim:

    field    keys          values         bytes of one vector
    8 bits   [128, D]      [D, 128]       D
    4 bits   [128, D/2]    [D, 64]        D/2
    2 bits   [128, D/4]    [D, 32]        D/4
    1 bit    [64, D/4]     [D/2, 32]      D/8

Keys (byte b of the row of token t):
    4 bits   bits 0-3: dim 2b, bits 4-7: dim 2b + 1
    2 bits   bits 2i, 2i + 1: dim 4b + i
    1 bit    row r holds tokens r and r + 64. bits 0, 1, 4, 5: dims 4b .. 4b + 3 of token r + 64;
             bits 2, 3, 6, 7: the same dims of token r
Values (word j, four bytes little-endian, of the row of dim d):
    8 bits   byte t: token t
    4 bits   nibble i < 4: token 4j + i; nibble 4 + i: token 64 + 4j + i
    2 bits   position p (bits 2p, 2p + 1) = 8 (o mod 2) + 2i + (o div 2): token 32o + 4j + i, o and i in 0 .. 3
    1 bit    row d holds dims d and d + D/2. The token at position p of the 2-bit plane has, in nibble p div 2,
             bit 2 + p mod 2 for dim d and bit p mod 2 for dim d + D/2

These orders let a kernel turn a 32-bit word into matrix operands by byte look-ups alone. The 1-bit plane is shaped so
that each of its words belongs to two words of the 2-bit plane.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

BLOCK = 128


@dataclass(frozen=True)
class Field:
    """The positions of the `width`-bit fields of one block `[128, head_dim]`, as a permutation of axes."""

    width: int
    split: Callable[[int], tuple[int, ...]]  # the block seen with one axis for each index of the bit picture
    order: tuple[int, ...]  # the axes in the order bytes × positions within a byte
    rows: Callable[[int], tuple[int, int]]  # shape of the plane of one block
    flip: int | None = None  # the axis that runs backwards


# The axes of a split are named after the bit pictures above: t = token, r = row, h = half of the tokens or dims,
# b = byte, i = position, j = word, o = quarter of the tokens (o = 2 oh + ol, i = 2 ih + il)
_KEYS = {
    8: Field(8, lambda d: (128, d, 1), (0, 1, 2), lambda d: (128, d)),
    4: Field(4, lambda d: (128, d // 2, 2), (0, 1, 2), lambda d: (128, d // 2)),
    2: Field(2, lambda d: (128, d // 4, 4), (0, 1, 2), lambda d: (128, d // 4)),
    # h r b i e -> r b | i h e
    1: Field(1, lambda d: (2, 64, d // 4, 2, 2), (1, 2, 3, 0, 4), lambda d: (64, d // 4), flip=0),
}
_VALUES = {
    8: Field(8, lambda d: (128, d, 1), (1, 0, 2), lambda d: (d, 128)),
    # h j ih il d -> d j h ih | il
    4: Field(4, lambda d: (2, 16, 2, 2, d), (4, 1, 0, 2, 3), lambda d: (d, 64)),
    # oh ol j ih il d -> d j ol ih | il oh
    2: Field(2, lambda d: (2, 2, 8, 2, 2, d), (5, 2, 1, 3, 4, 0), lambda d: (d, 32)),
    # oh ol j ih il h d -> d j ol ih | il h oh
    1: Field(1, lambda d: (2, 2, 8, 2, 2, 2, d // 2), (6, 2, 1, 3, 4, 5, 0), lambda d: (d // 2, 32), flip=5),
}
LAYOUTS = {"keys": _KEYS, "values": _VALUES}


def field_widths(nbits: int) -> list[int]:
    """Widths of the fields of a code, widest first: `field_widths(3) == [2, 1]`."""
    return [width for width in (8, 4, 2, 1) if nbits & width]


def codes_per_byte(nbits: int) -> int:
    """Codes that share a byte of the widest field's plane. That field is as wide as the highest bit of `nbits`."""
    return 8 >> (nbits.bit_length() - 1)


def can_pack(head_dim: int) -> bool:
    """Whether vectors of this width have codes: codebooks begin at 16 dimensions, and a byte holds up to four codes."""
    return head_dim >= 16 and head_dim % 4 == 0


def plane_shapes(nbits: int, layout: str, head_dim: int) -> dict[str, tuple[int, int]]:
    """Name and shape of every plane of one block; `layout` is `"keys"` or `"values"`, names are `"plane2"` etc."""
    if not can_pack(head_dim):
        raise ValueError(
            f"`head_dim` must be a multiple of 4, 16 at least, to be packed, got {head_dim}. Use `skip_layers`."
        )
    return {f"plane{width}": LAYOUTS[layout][width].rows(head_dim) for width in field_widths(nbits)}


def pack(codes: torch.Tensor, nbits: int, layout: str) -> dict[str, torch.Tensor]:
    """
    Packs whole blocks.

    Args:
        codes (`torch.Tensor`): uint8 codes below `2**nbits`, of shape `[..., tokens, head_dim]`, `tokens` a multiple
            of 128.

    Returns:
        Planes by name, uint8, of shape `[..., tokens / 128, *plane_shapes(...)[name]]`.
    """
    *batch, tokens, head_dim = codes.shape
    planes = {}
    shift = 0
    for width in field_widths(nbits):
        field = LAYOUTS[layout][width]
        part = (codes >> shift) & (2**width - 1)
        part = part.reshape(*batch, tokens // BLOCK, *field.split(head_dim))
        first = len(batch) + 1
        if field.flip is not None:
            part = part.flip(first + field.flip)
        part = part.permute(*range(first), *(first + axis for axis in field.order))
        part = part.reshape(*batch, tokens // BLOCK, *field.rows(head_dim), 8 // width)
        packed = part[..., 0].clone()
        for position in range(1, 8 // width):
            packed |= part[..., position] << (position * width)
        planes[f"plane{width}"] = packed
        shift += width
    return planes


def unpack(planes: dict[str, torch.Tensor], nbits: int, layout: str, head_dim: int) -> torch.Tensor:
    """The inverse of [`pack`]: uint8 codes of shape `[..., blocks * 128, head_dim]`."""
    codes = None
    shift = 0
    for width in field_widths(nbits):
        field = LAYOUTS[layout][width]
        plane = planes[f"plane{width}"]
        *batch, blocks, _, _ = plane.shape
        first = len(batch) + 1
        split = field.split(head_dim)
        part = torch.stack([(plane >> (i * width)) & (2**width - 1) for i in range(8 // width)], dim=-1)
        part = part.reshape(*batch, blocks, *(split[axis] for axis in field.order))
        inverse = [field.order.index(axis) for axis in range(len(split))]
        part = part.permute(*range(first), *(first + axis for axis in inverse))
        if field.flip is not None:
            part = part.flip(first + field.flip)
        part = part.reshape(*batch, blocks * BLOCK, head_dim) << shift
        codes = part if codes is None else codes | part
        shift += width
    return codes
