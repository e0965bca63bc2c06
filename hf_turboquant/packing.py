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

from collections.abc import Iterator
from functools import lru_cache, reduce
from operator import or_

import torch

BLOCK = 128

# By the width of a field: how blocks `[blocks, 128, head_dim]` are split into one axis for each index of the bit
# pictures, and the order of these axes in a plane: blocks, rows, bytes of a row | positions within a byte. The axes are
# named after the pictures: t = token, r = row, h = half of the tokens or dims, b = byte, i = position, j = word,
# o = quarter of the tokens (o = 2 oh + ol, i = 2 ih + il). d is the head_dim.
LAYOUTS = {
    "keys": {
        8: (lambda d: (-1, 128, d), (0, 1, 2)),
        4: (lambda d: (-1, 128, d // 2, 2), (0, 1, 2, 3)),
        2: (lambda d: (-1, 128, d // 4, 4), (0, 1, 2, 3)),
        # h r b i e -> r b | i h e
        1: (lambda d: (-1, 2, 64, d // 4, 2, 2), (0, 2, 3, 4, 1, 5)),
    },
    "values": {
        8: (lambda d: (-1, 128, d), (0, 2, 1)),
        # h j ih il d -> d j h ih | il
        4: (lambda d: (-1, 2, 16, 2, 2, d), (0, 5, 2, 1, 3, 4)),
        # oh ol j ih il d -> d j ol ih | il oh
        2: (lambda d: (-1, 2, 2, 8, 2, 2, d), (0, 6, 3, 2, 4, 5, 1)),
        # oh ol j ih il h d -> d j ol ih | il h oh
        1: (lambda d: (-1, 2, 2, 8, 2, 2, 2, d // 2), (0, 7, 3, 2, 4, 5, 6, 1)),
    },
}


def codes_per_byte(nbits: int) -> int:
    """Codes that share a byte of the widest field's plane. That field is as wide as the highest bit of `nbits`."""
    return 8 >> (nbits.bit_length() - 1)


def can_pack(head_dim: int) -> bool:
    """Whether vectors of this width have codes: codebooks begin at 16 dimensions, and a byte holds up to four codes."""
    return head_dim >= 16 and head_dim % 4 == 0


def check_head_dim(head_dim: int) -> None:
    """
    Raises:
        `ValueError`: vectors of this width have no codes.
    """
    if not can_pack(head_dim):
        raise ValueError(
            f"`head_dim` must be a multiple of 4, 16 at least, to be packed, got {head_dim}. Use `skip_layers`."
        )


@lru_cache(maxsize=1024)
def plane_shapes(nbits: int, layout: str, head_dim: int) -> dict[str, tuple[int, int]]:
    """Name and shape of every plane of one block; `layout` is `"keys"` or `"values"`, names are `"plane2"` etc."""
    check_head_dim(head_dim)
    shapes = {}
    for name, width, _, split, order in _fields(nbits, layout, head_dim):
        rows = split[order[1]]
        shapes[name] = rows, BLOCK * head_dim * width // (8 * rows)
    return shapes


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
    shapes, planes = plane_shapes(nbits, layout, head_dim), {}
    for name, width, shift, split, order in _fields(nbits, layout, head_dim):
        part = (codes >> shift) & (2**width - 1)
        part = part.reshape(split).permute(order).reshape(*batch, tokens // BLOCK, *shapes[name], 8 // width)
        planes[name] = reduce(or_, (part[..., i] << bit for i, bit in enumerate(_bits(width))))
    return planes


def unpack(planes: dict[str, torch.Tensor], nbits: int, layout: str, head_dim: int) -> torch.Tensor:
    """The inverse of [`pack`]: uint8 codes of shape `[..., blocks * 128, head_dim]`."""
    parts = []
    for name, width, shift, split, order in _fields(nbits, layout, head_dim):
        *batch, blocks, _, _ = planes[name].shape
        part = torch.stack([(planes[name] >> bit) & (2**width - 1) for bit in _bits(width)], dim=-1)
        part = part.reshape([split[axis] for axis in order]).movedim(tuple(range(len(order))), order)
        parts.append(part.reshape(*batch, blocks * BLOCK, head_dim) << shift)
    return reduce(or_, parts)


def _fields(nbits: int, layout: str, head_dim: int) -> Iterator[tuple]:
    """The fields of a code, widest first: name of the plane, width, lowest bit, split and order: see `LAYOUTS`."""
    shift = 0
    for width, (split, order) in LAYOUTS[layout].items():
        if nbits & width:
            yield f"plane{width}", width, shift, split(head_dim), order
            shift += width


def _bits(width: int) -> list[int]:
    """The lowest bit of every position in a byte. With fields of 1 bit, the first half h has the upper bit pairs."""
    return [i ^ 2 for i in range(8)] if width == 1 else list(range(0, 8, width))
