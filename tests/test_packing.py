import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_turboquant.packing import BLOCK, pack, plane_shapes, unpack


@settings(max_examples=60, deadline=None)
@given(
    nbits=st.sampled_from([2, 3, 4, 8]),
    layout=st.sampled_from(["keys", "values"]),
    head_dim=st.sampled_from([16, 20, 24, 64, 80, 100, 112, 576]),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_round_trip_wastes_no_bit(nbits, layout, head_dim, blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 1, blocks * BLOCK, head_dim)
    codes = torch.randint(0, 2**nbits, shape, generator=generator, dtype=torch.uint8)
    planes = pack(codes, nbits, layout)
    assert sum(plane.numel() for plane in planes.values()) * 8 == codes.numel() * nbits
    assert {name: plane.shape[3:] for name, plane in planes.items()} == plane_shapes(nbits, layout, head_dim)
    assert torch.equal(unpack(planes, nbits, layout, head_dim), codes)


# the bit pictures of the docstring, written out once more: (token, dim) -> (row, byte, lowest bit) of every plane
def _key_place(nbits, token, dim, head_dim):
    if nbits == 8:
        return {"plane8": (token, dim, 0)}
    if nbits == 4:
        return {"plane4": (token, dim // 2, 4 * (dim % 2))}
    places = {"plane2": (token, dim // 4, 2 * (dim % 4))}
    if nbits == 3:
        bit = (0, 1, 4, 5)[dim % 4] + (2 if token < 64 else 0)
        places["plane1"] = (token % 64, dim // 4, bit)
    return places


def _value_place(nbits, token, dim, head_dim):
    if nbits == 8:
        return {"plane8": (dim, token, 0)}
    if nbits == 4:
        half, rest = divmod(token, 64)
        nibble = 4 * half + rest % 4
        return {"plane4": (dim, 4 * (rest // 4) + nibble // 2, 4 * (nibble % 2))}
    quarter, rest = divmod(token, 32)
    word, i = divmod(rest, 4)
    position = 8 * (quarter % 2) + 2 * i + quarter // 2
    places = {"plane2": (dim, 4 * word + position // 4, 2 * (position % 4))}
    if nbits == 3:
        bit = 4 * (position // 2) + position % 2 + (2 if dim < head_dim // 2 else 0)
        places["plane1"] = (dim % (head_dim // 2), 4 * word + bit // 8, bit % 8)
    return places


@pytest.mark.parametrize(("layout", "place"), [("keys", _key_place), ("values", _value_place)])
@pytest.mark.parametrize("nbits", (2, 3, 4, 8))
def test_bit_picture(layout, place, nbits):
    head_dim = 32
    generator = torch.Generator().manual_seed(nbits)
    codes = torch.randint(0, 2**nbits, (BLOCK, head_dim), generator=generator, dtype=torch.uint8)
    planes = {name: plane[0] for name, plane in pack(codes, nbits, layout).items()}
    for token in range(BLOCK):
        for dim in range(head_dim):
            code, shift = int(codes[token, dim]), 0
            for name, (row, byte, bit) in place(nbits, token, dim, head_dim).items():
                width = int(name[-1])
                found = int(planes[name][row, byte]) >> bit & (2**width - 1)
                assert found == code >> shift & (2**width - 1), (name, token, dim)
                shift += width


def test_odd_head_dim_is_refused():
    with pytest.raises(ValueError, match="`head_dim` must be a multiple of 4, 16 at least, to be packed, got 18"):
        plane_shapes(4, "keys", 18)
