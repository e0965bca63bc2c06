"""Steps: one launch that appends, lengths in device memory or not, and attention that finds its plan again."""

import copy
import importlib.util
import pickle

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from layer_states import relative_error

from hf_turboquant import TurboQuantConfig, ops
from hf_turboquant.arena import describe, new_arena, open_arena
from hf_turboquant.layer import TurboQuantLayer
from hf_turboquant.ops import attend as attention_kernels
from hf_turboquant.ops import attention_plan, reference
from hf_turboquant.ops import encode as quantize_kernels
from hf_turboquant.quantizer import Quantizer
from hf_turboquant.states import AttentionOptions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
HEADS = 2
ROLES = ("keys", "values")


def random_tokens(count, head_dims=(64, 64), dtype=DTYPES[0], batch=1, seed=0):
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    # as models hand them over: heads next to each other
    shapes = [(batch, count, HEADS, head_dim) for head_dim in head_dims]
    return [torch.randn(s, generator=generator, device=DEVICE).to(dtype).transpose(1, 2) for s in shapes]


def new_states(keys, values, capacity=200, waiting=False, **options):
    """An open arena, poisoned but for its counters and conditioning; `waiting` tokens fill all exact slots."""
    config = TurboQuantConfig(max_cache_len=capacity, backend="triton", **options)
    description = describe(config, 0, keys, values)
    arena = new_arena(description, torch.device(DEVICE))
    arena.fill_(255)
    states = open_arena(arena, description)
    states.counters.zero_()
    states.counters[..., 2] = states.ring if waiting else config.residual_length
    if config.condition != "none":
        generator = torch.Generator(device=DEVICE).manual_seed(1)
        states.quantizers["keys"].mean.normal_(generator=generator)
        states.quantizers["keys"].scale.uniform_(0.5, 2, generator=generator)
    return states


def fill(states, keys, values, count):
    """The first `count` tokens, as a prefill leaves them."""
    sinks, ring = states.sink_length, states.ring
    quantized = max(0, count - sinks - int(states.counters[0, 0, 2]))
    for role, new in (("keys", keys), ("values", values)):
        buffer = states.codes[role].snapshot()
        buffer.length = 0
        quantize_kernels.quantize((new[:, :, sinks : sinks + quantized], states.quantizers[role], buffer))
        for position in [*range(min(sinks, count)), *range(sinks + quantized, count)]:
            slot = position if position < sinks else sinks + (position - sinks) % ring
            states.exact[role][:, :, slot] = new[:, :, position]
    states.counters[..., 0], states.counters[..., 1] = count, quantized


def assert_same_tokens(ours, theirs, role):
    """Whether two states hold the same, of tokens that came one by one and of such that came together."""
    pairs = list(zip(contents(ours, role), contents(theirs, role), strict=True))
    if DEVICE == "cuda" and ours.quantizers[role].annealing is not None:
        # a search in 16 bits that meets a boundary may end elsewhere, as near
        read = [
            reference.decode(codes, {"scales": scales, "residual_norms": norms}, ours.quantizers[role])
            for codes, scales, norms, _ in zip(*pairs, strict=True)
        ]
        # of the first steps, nothing is in codes yet
        assert (read[0] - read[1]).norm() <= 0.6 * read[1].norm()
        pairs = pairs[-1:]
    elif DEVICE == "cuda" and ours.quantizers[role].estimator == "int8":
        # a scale on a boundary changes many codes of its vector; all are nearest to the same numbers
        (codes, other_codes), (scales, other_scales), _ = pairs
        read = codes.view(torch.int8) * scales.unsqueeze(-1).float()
        other = other_codes.view(torch.int8) * other_scales.unsqueeze(-1).float()
        assert ((read - other).abs() <= 0.505 * (scales + other_scales).unsqueeze(-1).float()).all()
        pairs = pairs[-1:]
    for mine, other in pairs:
        # a launch for one token sums in another order than one for many
        assert (mine != other).sum() <= 1e-3 * mine.numel()


def contents(states, role):
    """Codes and scales of all tokens that are quantized, and those of the exact slots that are taken."""
    now = states.measured()
    codes, scales = reference.codes_of(now.codes[role], states.quantizers[role], 0, now.quantized)
    slots = [slot for _, run in now.exact_runs() for slot in range(run.start, run.stop)]
    return codes, *scales.values(), states.exact[role][:, :, slots]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sinks, ring, options",
    [
        (4, 8, {"nbits": 4}),
        (4, 8, {"nbits": 4, "waiting": True}),
        (4, 8, {"nbits": 3, "condition": "none"}),
        (4, 8, {"nbits": 2, "key_estimator": "rescaled"}),
        (4, 8, {"nbits": 8}),
        (0, 5, {"key_bits": 8, "value_bits": 3, "condition": "none"}),
        (0, 5, {"key_bits": 2, "value_bits": 3, "value_estimator": "mse"}),
        (3, 0, {"nbits": 4, "condition": "none"}),
        (0, 0, {"nbits": 3}),
        (0, 1, {"nbits": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("start", [0, 126])
@pytest.mark.usefixtures("same_search")
def test_steps_leave_what_a_prefill_leaves(start, sinks, ring, options, dtype):
    keys, values = random_tokens(140, dtype=dtype)
    options = {"sink_length": sinks, "residual_length": ring, **options}
    stepped, filled = (new_states(keys, values, **options) for _ in range(2))
    fill(stepped, keys, values, start)
    for count in range(start, start + 14):
        ops.append(stepped, keys[:, :, count : count + 1], values[:, :, count : count + 1])
    fill(filled, keys, values, start + 14)
    assert torch.equal(stepped.counters, filled.counters)
    for role in ROLES:
        assert_same_tokens(stepped, filled, role)


def dynamic_layer(sinks=4, ring=8, **options):
    options = {"sink_length": sinks, "residual_length": ring, "condition": "none", "backend": "triton", **options}
    return TurboQuantLayer(TurboQuantConfig(**options), 0)


def grow(layer, keys, values, start, stop):
    """Token by token; the handles of the last one."""
    for at in range(start, stop):
        handles = layer.update(keys[:, :, at : at + 1], values[:, :, at : at + 1])
    return handles


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sinks, ring, options",
    [
        (4, 8, {}),
        (0, 5, {"nbits": 3, "key_estimator": "rescaled"}),
        (3, 0, {"nbits": 2}),
        (0, 0, {"nbits": 4}),
        (4, 8, {"nbits": 8}),
        (0, 5, {"key_bits": 8, "value_bits": 4}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("same_search")
def test_steps_of_a_growing_layer_leave_what_a_prefill_leaves(sinks, ring, options, dtype):
    # past the first 128 codes, where buffers grow
    keys, values = random_tokens(150, dtype=dtype, batch=2)
    stepped, filled = (dynamic_layer(sinks, ring, **options) for _ in range(2))
    for layer, first in ((stepped, 120), (filled, 150)):
        layer.update(keys[:, :, :first], values[:, :, :first])
    query = torch.randn(2, 4, 1, 64, device=DEVICE).to(dtype)
    for start in range(120, 150, 10):
        states = grow(stepped, keys, values, start, start + 10)[0].states
        error = relative_error(
            ops.attention(query, states, scaling=0.125),
            reference.attention(query.float(), states, AttentionOptions(scaling=0.125)),
        )
        assert error < (2e-3 if dtype == torch.float16 else 1.6e-2)
    assert stepped.tokens.length == filled.tokens.length == 150
    for role in ROLES:
        assert stepped.tokens.codes[role].length == filled.tokens.codes[role].length == 150 - sinks - ring
        assert_same_tokens(stepped.tokens.read(), filled.tokens.read(), role)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sinks, ring, head_dims, options",
    [
        (4, 8, (64, 64), {"nbits": 4}),
        (0, 70, (128, 64), {"nbits": 3}),
        (0, 5, (80, 48), {"nbits": 2, "key_estimator": "rescaled"}),
        (3, 0, (64, 64), {"key_bits": 3, "value_bits": 4, "key_estimator": "mse", "condition": "center"}),
        (0, 1, (256, 256), {"nbits": 4, "condition": "attention"}),
        (4, 8, (64, 80), {"nbits": 8}),
        (0, 5, (80, 64), {"key_bits": 4, "value_bits": 8}),
    ],
    ids=str,
)
def test_attention_to_what_was_just_appended(sinks, ring, head_dims, options, dtype):
    keys, values = random_tokens(200, head_dims, dtype, batch=2)
    layer = dynamic_layer(sinks, ring, **options)
    query = torch.randn(2, 4, 1, head_dims[0], device=DEVICE).to(dtype)
    mask = torch.ones(2, 1, 1, 200, dtype=torch.bool, device=DEVICE)
    mask[1, ..., :100] = False
    scaling = head_dims[0] ** -0.5
    layer.update(keys[:, :, :136], values[:, :, :136])
    layer.settle(query)
    for start, stop in ((136, 142), (140, 143)):
        if start < layer.tokens.length:
            # steps go on with a ring that is not full
            layer.crop(start - layer.tokens.length)
        for at in range(start, stop):
            states = grow(layer, keys, values, at, at + 1)[0].states
            attention_mask = None if at % 2 else mask
            truth = reference.attention(
                query.float(), states, AttentionOptions(scaling=scaling, attention_mask=attention_mask)
            )
            for _ in range(2):
                out = ops.attention(query, states, scaling=scaling, attention_mask=attention_mask)
                assert relative_error(out, truth) < (2e-3 if dtype == torch.float16 else 1.6e-2)
            last = keys[:, :, at] if ring else None
            assert last is None or torch.equal(ops.dequantize_all(states, "keys")[:, :, at], last)


@pytest.mark.parametrize("look", ["dequantize", "scores", "copy", "crop", "keys", "update"])
def test_the_newest_token_is_there_without_attention_too(look):
    keys, values = random_tokens(140)
    query = torch.randn(1, 4, 1, 64, device=DEVICE).to(keys.dtype)
    layer = dynamic_layer(nbits=4)
    layer.update(keys[:, :, :100], values[:, :, :100])
    handle = grow(layer, keys, values, 100, 130)[0]
    if look == "dequantize":
        assert torch.equal(handle.dequantize()[:, :, 129], keys[:, :, 129])
    elif look == "scores":
        logits = ops.scores(query, handle.states, scaling=1.0)[..., 129]
        truth = query.view(1, 2, 2, 64).float() @ keys[:, :, 129, :, None].float()
        assert relative_error(logits.view(1, 2, 2, 1), truth) < 1e-3
    elif look == "copy":
        assert torch.equal(copy.deepcopy(layer).keys.dequantize()[:, :, 129], keys[:, :, 129])
    elif look == "crop":
        layer.crop(-3)
        assert torch.equal(layer.keys.dequantize()[:, :, 126], keys[:, :, 126])
    elif look == "keys":
        assert torch.equal(layer.keys.dequantize()[:, :, 129], keys[:, :, 129])
    else:
        grow(layer, keys, values, 130, 131)
        assert torch.equal(layer.keys.dequantize()[:, :, 129], keys[:, :, 129])


def test_tokens_may_lie_anywhere():
    """Launches for aligned tokens are not for those that are not, nor for other strides."""
    keys, values = random_tokens(220)
    query = torch.randn(1, 4, 1, 64, device=DEVICE).to(keys.dtype)
    layer = dynamic_layer(nbits=4)
    layer.update(keys[:, :, :200], values[:, :, :200])
    for at, offset in enumerate((0, 3, 0, 8, 3), start=200):
        wide = torch.zeros(1, HEADS, 1, 80, device=DEVICE, dtype=keys.dtype)
        new = wide[..., offset : offset + 64] if offset else keys[:, :, at : at + 1]
        new.copy_(keys[:, :, at : at + 1])
        states = layer.update(new, values[:, :, at : at + 1])[0].states
        out = ops.attention(query, states, scaling=0.125)
        assert relative_error(out, reference.attention(query.float(), states, AttentionOptions(scaling=0.125))) < 2e-3
        assert torch.equal(layer.keys.dequantize()[:, :, at], keys[:, :, at])


def test_plans_are_for_the_buffers_that_they_were_made_for():
    keys, values = random_tokens(400)
    query = torch.randn(1, 4, 1, 64, device=DEVICE).to(keys.dtype)
    layer = dynamic_layer(nbits=3)

    def attend(layer, start, stop):
        states = grow(layer, keys, values, start, stop)[0].states
        out = ops.attention(query, states, scaling=0.125)
        assert relative_error(out, reference.attention(query.float(), states, AttentionOptions(scaling=0.125))) < 2e-3
        return dict(layer.tokens.plans)

    layer.update(keys[:, :, :200], values[:, :, :200])
    first = attend(layer, 200, 201)
    # of appending, and of attention
    assert len(first) == 2
    # the same block, the same buffers: nothing is worked out again
    assert all(plan is first[key] for key, plan in attend(layer, 201, 202).items())
    # a copy has buffers of its own, and writes to none of the original's
    twin = copy.deepcopy(layer)
    before = [tensor.clone() for role in ROLES for tensor in contents(layer.tokens.read(), role)]
    assert not twin.tokens.plans and not pickle.loads(pickle.dumps(layer)).tokens.plans
    assert not set(attend(twin, 210, 215).values()) & set(first.values())
    assert all(map(torch.equal, before, (tensor for role in ROLES for tensor in contents(layer.tokens.read(), role))))
    # new blocks, then new buffers; what is kept is for the new ones alone
    plans = attend(layer, 202, 330)
    assert not set(plans.values()) & set(first.values())
    layer.reorder_cache(torch.tensor([0]))
    assert not layer.tokens.plans
    attend(layer, 330, 332)
    layer.crop(-20)
    attend(layer, 312, 320)
    assert all(plan.fits(layer.tokens.read()) for plan in layer.tokens.plans.values())
    layer.reset()
    assert not layer.tokens.plans


def test_steps_of_a_static_layer_share_a_plan_and_attention_has_none():
    keys, values = random_tokens(160)
    layer = TurboQuantLayer(TurboQuantConfig(max_cache_len=300, backend="triton", condition="none"), 0)
    layer.update(keys[:, :, :150], values[:, :, :150])
    plans = []
    for at in range(150, 154):
        states = grow(layer, keys, values, at, at + 1)[0].states
        ops.attention(torch.randn(1, 4, 1, 64, device=DEVICE).to(keys.dtype), states, scaling=0.125)
        plans += layer.tokens.states.plans.values()
    assert len(plans) == 4 and len(set(plans)) == 1
    # of tokens that lie elsewhere, in place of that one
    wide = torch.zeros(1, HEADS, 1, 80, device=DEVICE, dtype=keys.dtype)[..., 3:67]
    layer.update(wide, wide)
    (other,) = layer.tokens.states.plans.values()
    assert other is not plans[0]


def test_a_token_that_is_a_handle_or_elsewhere():
    keys, values = random_tokens(150)
    one, layer = dynamic_layer(sinks=0, ring=0), dynamic_layer()
    one.update(keys[:, :, :1], values[:, :, :1])
    static = TurboQuantLayer(TurboQuantConfig(max_cache_len=300, backend="triton", condition="none"), 0)
    for held in (layer, static):
        held.update(keys[:, :, :140], values[:, :, :140])
        # twice, because the second step of its kind takes a shorter way
        for at in (140, 141):
            held.update(one.keys, one.values)
            assert torch.equal(held.keys.dequantize()[:, :, at : at + 1], one.keys.dequantize())
    layer.update(keys[:, :, :1], values[:, :, :1])
    elsewhere = torch.empty_like(keys[:, :, :1], device="meta")
    with pytest.raises(ValueError):
        ops.append(layer.tokens.read(), elsewhere, elsewhere)


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.usefixtures("same_search")
def test_kernels_and_reference_do_the_same(backend):
    keys, values = random_tokens(30, head_dims=(80, 48))
    append = {"kernels": quantize_kernels.append, "reference": reference.append}[backend]
    states = new_states(keys, values, capacity=30, sink_length=2, residual_length=3)
    expected = new_states(keys, values, capacity=30, sink_length=2, residual_length=3)
    fill(expected, keys, values, 30)
    for count in range(30):
        append(states, {"keys": keys[:, :, count : count + 1], "values": values[:, :, count : count + 1]})
    assert torch.equal(states.counters, expected.counters) and states.measured().kv_len == 30
    for role in ROLES:
        assert torch.equal(contents(states, role)[-1], contents(expected, role)[-1])
        if DEVICE == "cuda" and role == "keys":
            assert_same_tokens(states, expected, role)
            continue
        # the interpreter cuts two-byte scales where torch rounds them
        ours, theirs = contents(states, role)[0], contents(expected, role)[0]
        assert (ours != theirs).float().mean() <= 1e-3


@pytest.mark.parametrize("capacity, sinks, ring", [(20, 2, 30), (130, 2, 8), (130, 0, 0)])
def test_nothing_is_written_beyond_the_capacity(capacity, sinks, ring):
    keys, values = random_tokens(capacity + 1)
    states = new_states(keys, values, capacity, sink_length=sinks, residual_length=ring)
    fill(states, keys, values, capacity)
    query = torch.randn(1, 4, 1, 64, device=DEVICE).to(keys.dtype)
    assert attention_kernels.attention(query, states, AttentionOptions(scaling=0.1)).isfinite().all()
    before = {role: [t.clone() for t in contents(states, role)] for role in ROLES}
    for _ in range(2):
        ops.append(states, keys[:, :, -1:], values[:, :, -1:])
    # a compiled step cannot raise: it shows in everything that comes of it, and raises where the host looks
    assert attention_kernels.attention(query, states, AttentionOptions(scaling=0.1)).isnan().all()
    with pytest.raises(ValueError, match=f"max_cache_len={capacity}"):
        states.measured()
    states.counters[..., 0] = capacity
    for role in ROLES:
        assert all(torch.equal(now, then) for now, then in zip(contents(states, role), before[role], strict=True))
    with pytest.raises(ValueError, match=f"max_cache_len={capacity}"):
        reference.append(states, {"keys": keys[:, :, -1:], "values": values[:, :, -1:]})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nbits, count", [(4, n) for n in (1, 3, 12, 13, 140, 141, 400)] + [(3, 300), (2, 300)])
def test_attention_reads_lengths_from_the_device(count, nbits, dtype):
    keys, values = random_tokens(400, dtype=dtype, batch=2)
    states = new_states(keys, values, 400, nbits=nbits, sink_length=4, residual_length=8)
    fill(states, keys, values, count)
    query = torch.randn(2, 4, 1, 64, device=DEVICE).to(dtype)
    # as transformers makes it: one column for every token that there is room for
    mask = (torch.arange(400, device=DEVICE) < count).repeat(2, 1)[:, None, None]
    mask[1, ..., : count // 2] = False
    for attention_mask in (None, mask):
        options = {"scaling": 0.125, "attention_mask": attention_mask}
        got = attention_kernels.attention(query, states, AttentionOptions(**options))
        truth = reference.attention(query.float(), states, AttentionOptions(**options))
        assert relative_error(got, truth) < (1e-3 if dtype == torch.float16 else 8e-3)


@pytest.mark.parametrize("capacity", [None, 60])
@pytest.mark.parametrize(
    "dtypes, query_dtype",
    [(("float32", "bfloat16"), "float32"), (("float32", "float16"), "float16"), (("float16", "bfloat16"), "bfloat16")],
    ids=str,
)
@pytest.mark.usefixtures("same_search")
def test_each_role_has_its_own_dtype(dtypes, query_dtype, capacity):
    """As under autocast, and as it begins and ends: a step in other dtypes than the tokens held."""
    dtypes, query_dtype = [getattr(torch, dtype) for dtype in dtypes], getattr(torch, query_dtype)
    tokens = random_tokens(44, (64, 32), torch.float32)
    layer = dynamic_layer(nbits=4, max_cache_len=capacity)
    if capacity is not None:
        layer = TurboQuantLayer(layer.config, 0)
    given, query = [[], []], torch.randn(1, 4, 1, 64, device=DEVICE).to(query_dtype)
    for at in (0, *range(40, 44)):
        piece = slice(at, at + 1) if at else slice(40)
        # in turns in the dtypes of the prompt, in fp32, and in fp16
        wanted = dtypes if at % 3 == 0 else [torch.float32, torch.float16][at % 3 - 1 : at % 3] * 2
        new = [x[:, :, piece].to(dtype) for x, dtype in zip(tokens, wanted, strict=True)]
        for all_given, x in zip(given, new, strict=True):
            all_given.append(x)
        states = layer.update(*new)[0].states if at else layer.update(*new)
        if at:
            out = ops.attention(query, states, scaling=0.125)
            assert out.dtype == query_dtype
            truth = reference.attention(query.float(), states, AttentionOptions(scaling=0.125))
            assert relative_error(out, truth) < (1.6e-2 if query_dtype == torch.bfloat16 else 2e-3)
    expected = dynamic_layer(nbits=4)
    expected.update(*(torch.cat(x, dim=2).float() for x in given))
    for role, all_given in zip(ROLES, given, strict=True):
        held = (layer.keys if role == "keys" else layer.values).dequantize()[:, :, :44]
        assert held.dtype == torch.cat(all_given, dim=2).dtype
        assert torch.equal(held[:, :, -8:], torch.cat(all_given, dim=2)[:, :, -8:])
        codes, _ = reference.codes_of(layer.tokens.codes[role], layer.tokens.quantizers[role], 0, 32)
        same = codes == reference.codes_of(expected.tokens.codes[role], expected.tokens.quantizers[role], 0, 32)[0]
        assert same.float().mean() > 0.99


@pytest.mark.parametrize(
    "query, keys, values, expected",
    [
        ("float16", "float16", "float16", "float16"),
        ("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float32", "bfloat16", "float32"),
        ("float16", "float16", "bfloat16", "float32"),
        ("bfloat16", "float16", "float16", "float32"),
    ],
)
def test_products_lose_nothing_of_any_dtype(query, keys, values, expected, monkeypatch):
    monkeypatch.setattr(attention_plan, "INTERPRETED", False)
    codebook = Quantizer.create(TurboQuantConfig(), "keys", 0, 64).codebook
    query, keys, values, expected = (getattr(torch, name) for name in (query, keys, values, expected))
    of_keys, of_values = (4, False, 64, 1, codebook), (4, 64, False, codebook)
    kernels = attention_plan.Kernels(
        torch.device(DEVICE), True, query, (keys, values), of_keys, of_values, (None, False), False, False, True, False
    )
    assert kernels.prepare.constants["DOT"] == attention_plan.DTYPES[expected]


def test_several_queries_see_up_to_themselves():
    keys, values = random_tokens(200)
    states = new_states(keys, values, 200, nbits=4, sink_length=4, residual_length=8)
    fill(states, keys, values, 140)
    ops.append(states, keys[:, :, 140:143], values[:, :, 140:143])
    assert states.measured().kv_len == 143
    query = torch.randn(1, 4, 3, 64, device=DEVICE).to(keys.dtype)
    mask = (torch.arange(200, device=DEVICE) <= torch.arange(140, 143, device=DEVICE)[:, None])[None, None]
    got = attention_kernels.attention(query, states, AttentionOptions(scaling=0.125, attention_mask=mask))
    causal = attention_kernels.attention(query, states, AttentionOptions(scaling=0.125, is_causal=True))
    truth = reference.attention(query.float(), states, AttentionOptions(scaling=0.125, is_causal=True))
    assert relative_error(got, truth) < 1e-3 and relative_error(causal, truth) < 1e-3


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.usefixtures("same_search")
def test_a_captured_step_goes_on_where_it_is_replayed():
    keys, values = random_tokens(300)
    states, expected = (new_states(keys, values, 300, sink_length=4, residual_length=8) for _ in range(2))
    fill(states, keys, values, 20)
    ops.warm(states)
    query = torch.randn(1, 4, 1, 64, device=DEVICE).to(keys.dtype)
    new = [torch.empty_like(x[:, :, :1]) for x in (keys, values)]

    def step():
        ops.append(states, *new)
        return attention_kernels.attention(query, states, AttentionOptions(scaling=0.125))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = step()
    torch.cuda.synchronize()
    fill(states, keys, values, 20)
    for count in range(20, 290):
        for held, given in zip(new, (keys, values), strict=True):
            held.copy_(given[:, :, count : count + 1])
        graph.replay()
    fill(expected, keys, values, 290)
    assert torch.equal(states.counters, expected.counters)
    for role in ROLES:
        assert_same_tokens(states, expected, role)
    truth = reference.attention(query.float(), states, AttentionOptions(scaling=0.125))
    assert relative_error(out, truth) < 2e-3
