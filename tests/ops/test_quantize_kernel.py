"""The kernel that quantizes and appends, against float64 mathematics and the reference."""

import dataclasses
import importlib.util

import pytest
import torch
from disagreement import Case, disagreement, matrix

from hf_turboquant import ops

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


from hf_turboquant.ops import encode as kernels

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
# half a unit of bf16, and of the 16 bits in which a search multiplies; the interpreter cuts where a GPU rounds
SCALE_ERROR = 2**-7 + 1e-5 if kernels.INTERPRETED else 2**-8 + 2**-11
# codes that differ from the reference's: where a search meets a boundary in 16 bits, it may end elsewhere, as near
MOST_ELSEWHERE = 0.03 if kernels.INTERPRETED else 0.08
PIECES = (1, 126, 1, 3, 130, 1)


def appended(case: Case, states: torch.Tensor, pieces=None, quantize=kernels.quantize):
    """A quantizer and its buffer, of random bytes at first, after appending the pieces of `states`."""
    quantizer = case.quantizer(DEVICE)
    buffer = quantizer.new_buffer(*states.shape[:2])
    buffer.reserve(states.shape[2])
    for tensor in buffer.tensors.values():
        tensor.view(torch.uint8).random_()
    for piece in states.split(pieces or states.shape[2], dim=2):
        quantize((piece, quantizer, buffer))
    return quantizer, buffer


def random_states(case: Case, tokens: int, batch: int = 1) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(batch, case.heads, tokens, case.head_dim).to(DEVICE, case.dtype)


def codes_of(quantizer, buffer, stop=None):
    """Codes and scales up to `stop`, as copies."""
    codes, scales = ops.reference.codes_of(buffer, quantizer, 0, buffer.length if stop is None else stop)
    return codes, {name: scale.clone() for name, scale in scales.items()}


@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "role, estimator, head_dim",
    [
        ("keys", "qjl", 64),
        ("keys", "rescaled", 64),
        ("keys", "mse", 64),
        ("values", "rescaled", 64),
        ("values", "mse", 64),
        # padded to 128
        ("keys", "qjl", 80),
        ("values", "rescaled", 80),
    ],
)
def test_every_width_role_and_estimator(role, estimator, head_dim, nbits):
    assert_right(Case(role, nbits, estimator, head_dim, torch.float32, heads=2))


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter is too slow for more than those above and below")
@pytest.mark.parametrize("case", matrix(), ids=str)
def test_every_configuration(case):
    states = random_states(case, sum(case.pieces), batch=2)
    quantizer, buffer = appended(case, states, case.pieces)
    result = disagreement(states, quantizer, buffer)
    limits = {"coordinate": 1e-4, "direction": 0.1, "sign": 1e-4, "scale": SCALE_ERROR, "error": 0.01}
    assert all(getattr(result, name) <= limit for name, limit in limits.items()), result


def test_conditioning_shares_the_matrix_of_the_search():
    # a captured graph keeps its address, and quantizers that conditioning makes come and go
    quantizer = Case(head_dim=64).quantizer(DEVICE)
    mean = torch.zeros(1, 1, 64, device=DEVICE)
    prepared = (
        kernels._prepare(q, torch.float32, 1)[1] for q in (quantizer, dataclasses.replace(quantizer, mean=mean))
    )
    first, second = (next(x for x in constants if getattr(x, "shape", None) == (64, 64)) for constants in prepared)
    assert first.data_ptr() == second.data_ptr() != quantizer.sketch.data_ptr()


@pytest.mark.parametrize("nbits", [2, 3, 4])
def test_an_error_is_found_where_nothing_is_searched(nbits):
    case = Case(nbits=nbits, head_dim=64, dtype=torch.float32, heads=1)
    states = random_states(case, 131)
    quantizer = case.quantizer(DEVICE)
    nearest = dataclasses.replace(quantizer, annealing=dataclasses.replace(quantizer.annealing, rounds=0))
    buffer = nearest.new_buffer(1, 1)
    buffer.reserve(131)
    for piece in states.split((128, 1, 2), dim=2):
        kernels.quantize((piece, nearest, buffer))
    # the scales are right for what was chosen, and what was chosen is not good
    result = disagreement(states, quantizer, buffer)
    assert result.scale <= SCALE_ERROR and result.error > 0.2


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "role": "values", "nbits": 3, "estimator": "rescaled"},
        {"per_head": True},
        {"per_head": True, "role": "values", "nbits": 2, "estimator": "mse", "dtype": torch.bfloat16},
        {"sketch": "gaussian"},
        {"rotation": "hadamard", "head_dim": 96},
        {"head_dim": 256, "pieces": (127, 1, 2)},
        {"head_dim": 192, "pieces": (127, 1, 2), "role": "values", "nbits": 3, "estimator": "rescaled"},
        {"head_dim": 128, "pieces": (130,), "role": "keys", "nbits": 3, "estimator": "rescaled"},
        {"nbits": 8, "per_head": True},
        {"nbits": 8, "role": "values", "estimator": "rescaled", "dtype": torch.bfloat16, "head_dim": 96},
        {"nbits": 8, "head_dim": 256, "pieces": (127, 1, 2)},
        # the most shared memory: fp32 states, sketch and all
        {"head_dim": 128, "pieces": (130,)},
    ],
    ids=str,
)
def test_options(options):
    options = {"head_dim": 64, "dtype": torch.float32, "heads": 2} | options
    assert_right(Case(**options))


def assert_right(case: Case):
    case = dataclasses.replace(case, pieces=PIECES if len(case.pieces) > 3 else case.pieces)
    states = random_states(case, sum(case.pieces))
    quantizer, buffer = appended(case, states, case.pieces)
    assert buffer.length == states.shape[2]
    result = disagreement(states, quantizer, buffer)
    # one coordinate on a boundary changes the residual, and with it some signs of its vector; a scale of 8 bits on a
    # boundary changes many codes of its vector
    assert result.codes <= (1e-3 if quantizer.annealing is None and quantizer.nbits < 8 else MOST_ELSEWHERE)
    assert abs(result.error) <= 0.01
    # nor the cosine: which of two codes at a boundary a factor gives is decided by rounding
    assert result.coordinate <= 1e-5 and result.direction <= 0.1 and result.sign <= 1e-4
    assert result.scale <= SCALE_ERROR
    # what attention will read is no further from the states than the reference's, which errors in codes would show
    expected = appended(case, states, case.pieces, ops.reference.quantize)[1]
    decoded, reference = torch.empty_like(states.float()), torch.empty_like(states.float())
    ops.dequantize(buffer, quantizer, decoded)
    ops.dequantize(expected, quantizer, reference)
    error, reference_error = ((x - states.float()).norm() for x in (decoded, reference))
    assert 0 < error <= 1.01 * reference_error


@pytest.mark.parametrize(
    "role, nbits", [("keys", 3), ("keys", 4), ("keys", 8), ("values", 2), ("values", 3), ("values", 4), ("values", 8)]
)
@pytest.mark.parametrize("offset", [1, 63, 64, 127, 165])
def test_earlier_tokens_are_untouched(role, nbits, offset):
    case = Case(role, nbits, "rescaled", 64, torch.float32, heads=2)
    states = random_states(case, offset + 201, batch=2)
    for new in (1, 201):
        quantizer, buffer = appended(case, states[:, :, :offset], quantize=ops.reference.quantize)
        buffer.reserve(offset + new)
        codes, scales = codes_of(quantizer, buffer)
        kernels.quantize((states[:, :, offset : offset + new], quantizer, buffer))
        codes_now, scales_now = codes_of(quantizer, buffer, offset)
        assert torch.equal(codes_now, codes)
        assert torch.equal(scales_now["scales"], scales["scales"])
        # and the new ones were written
        assert disagreement(states[:, :, : offset + new], quantizer, buffer).scale <= SCALE_ERROR


@pytest.mark.parametrize(
    "case",
    [Case(head_dim=80), Case("values", 3, "rescaled", 64), Case("keys", 3, "mse", 64), Case("values", 8, "mse", 80)],
)
def test_a_bad_vector_stays_alone(case):
    case = dataclasses.replace(case, heads=2, dtype=torch.float32)
    states = random_states(case, 140)
    quantizer, buffer = appended(case, states, (139, 1))
    codes, scales = codes_of(quantizer, buffer)
    bad = [3, 64, 67, 70, 130, 139]
    states[:, 1, 3, 5] = torch.nan
    states[:, 1, 64, 7] = torch.inf
    states[:, 1, 67] = 0
    states[:, 1, 70] = 1e-30
    states[:, 1, 130] = 1e30
    states[:, 1, 139, 9] = torch.nan
    buffer = appended(case, states, (139, 1))[1]
    codes_now, scales_now = codes_of(quantizer, buffer)
    _, reference = ops.reference.encode(states, quantizer)
    good = torch.ones_like(codes[..., 0], dtype=torch.bool)
    good[:, 1, bad] = False
    assert torch.equal(codes_now[good], codes[good])
    for name, scale in scales_now.items():
        assert torch.equal(scale[good], scales[name][good])
        assert not scale[:, 1, [3, 64, 139]].isfinite().any()
        assert (scale[:, 1, 67] == 0).all()
        # the largest coordinate of 8 bits needs no square
        assert (scale[:, 1, 70] == 0).all() == (reference[name][:, 1, 70] == 0).all() == (case.nbits < 8)
        assert scale[:, 1, 130].isinf().all() == reference[name][:, 1, 130].isinf().all()


def test_strided_states():
    case = Case("values", 4, "rescaled", 64, torch.float32, heads=3)
    states = random_states(case, 150)
    wide = torch.full((150, 1, 2, 3, 64), torch.nan, device=DEVICE)
    wide[:, :, 1] = states.permute(2, 0, 1, 3)
    view = wide[:, :, 1].permute(1, 2, 0, 3)
    assert not view.is_contiguous() and torch.equal(view, states)
    for x in (view, states.mT.contiguous().mT):
        quantizer, buffer = appended(case, x, (20, 130))
        assert torch.equal(codes_of(quantizer, buffer)[0], codes_of(*appended(case, states, (20, 130)))[0])


def test_prompts_of_all_lengths_share_compiled_kernels(monkeypatch):
    """The table of compiled kernels would otherwise have one more for every length, since strides hold it."""
    used = set()
    case = Case("keys", 4, "qjl", 64)
    quantizer, buffer = appended(case, random_states(case, 1))
    buffer.reserve(600)
    monkeypatch.setattr(kernels, "run", lambda kernel, key, *_: used.add(key))
    for tokens in range(130, 170):
        states = random_states(case, tokens, batch=2)
        # as models give them: of heads or of tokens next to each other
        for x in (states.transpose(1, 2).contiguous().transpose(1, 2), states):
            # and so do the layers of a model, each of which has a quantizer of its own
            kernels.quantize((x, dataclasses.replace(quantizer), buffer))
            buffer.length = 0
    assert len(used) == 1


def test_pair():
    cases = (Case("keys", 4, "qjl", 64), Case("values", 3, "rescaled", 80))
    states = [random_states(case, 132, batch=2) for case in cases]
    singles = [appended(case, x, (2, 129, 1)) for case, x in zip(cases, states, strict=True)]
    quantizers, buffers = zip(*[appended(c, x[:, :, :0]) for c, x in zip(cases, states, strict=True)], strict=True)
    for buffer in buffers:
        buffer.reserve(132)
    for keys, values in zip(*(x.split((2, 129, 1), dim=2) for x in states), strict=True):
        kernels.quantize(*zip((keys, values), quantizers, buffers, strict=True))
    for quantizer, buffer, single in zip(quantizers, buffers, singles, strict=True):
        (codes, scales), (expected, expected_scales) = codes_of(quantizer, buffer), codes_of(*single)
        assert buffer.length == 132 and torch.equal(codes, expected)
        for name, scale in scales.items():
            assert torch.equal(scale, expected_scales[name])


def test_failure_leaves_the_lengths(monkeypatch):
    cases = (Case("keys", 4, "qjl", 64), Case("values", 3, "rescaled", 64))
    states = [random_states(case, 3) for case in cases]
    quantizers, buffers = zip(*[appended(c, x) for c, x in zip(cases, states, strict=True)], strict=True)
    for buffer in buffers:
        buffer.reserve(10)

    def fail(*parts):
        if len(parts) == 2 or parts[0][0] is not keys:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(kernels, "_launch", fail)
    for tokens in (1, 2):
        keys, values = (x[:, :, :tokens] for x in states)
        with pytest.raises(RuntimeError, match="out of memory"):
            kernels.quantize(*zip((keys, values), quantizers, buffers, strict=True))
        assert [buffer.length for buffer in buffers] == [3, 3]


def test_no_tokens():
    case = Case(head_dim=64, heads=2)
    quantizer, buffer = appended(case, random_states(case, 5))
    kernels.quantize((random_states(case, 5)[:, :, :0], quantizer, buffer))
    assert buffer.length == 5


@pytest.mark.parametrize(
    "case, dtype, device, reason",
    [
        (Case(head_dim=72), torch.float32, DEVICE, "in steps of 16, and the states have 72"),
        (Case(head_dim=272), torch.float32, DEVICE, "in steps of 16, and the states have 272"),
        (Case(head_dim=64), torch.float64, DEVICE, "float64"),
        (Case(head_dim=64), torch.float32, "meta", "the tensors are on meta"),
    ],
)
def test_supports(case, dtype, device, reason):
    states = torch.empty(1, 1, 3, case.head_dim, dtype=dtype, device=device)
    assert reason in kernels.supports(states, case.quantizer(DEVICE))


def test_the_backend_reaches_the_kernel(monkeypatch):
    case = Case(head_dim=64, dtype=torch.float32, heads=1)
    quantizer = case.quantizer(DEVICE)
    states, buffer, seen = random_states(case, 3), quantizer.new_buffer(1, 1), []
    assert kernels.supports(states, quantizer) is None
    original = kernels.quantize
    monkeypatch.setattr(kernels, "quantize", lambda *parts: (seen.append(parts[0][0].shape[2]), original(*parts)))
    ops.quantize((states, quantizer, buffer), backend="triton")
    ops.quantize((states, quantizer, buffer), backend="torch")
    assert seen == [3] and buffer.length == 6
