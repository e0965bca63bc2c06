"""One layer: what stays exact, what is quantized when, and that nothing is ever half changed."""

import pytest
import torch

from hf_turboquant import QuantizedStates, TurboQuantConfig, ops
from hf_turboquant.layer import TurboQuantLayer
from hf_turboquant.ops import reference
from hf_turboquant.states import LayerStates
from hf_turboquant.storage import TokenBuffer


def options(**options):
    # conditioning has its own tests: there the first tokens wait for a query
    return TurboQuantConfig(condition="none", **options)


def states(tokens, batch=2, heads=2, head_dim=32, seed=0, value_dim=None):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, heads, tokens, head_dim, generator=generator)
    return keys, torch.randn(batch, heads, tokens, value_dim or head_dim, generator=generator)


def feed(layer, keys, values, pieces):
    start = 0
    for piece in pieces:
        out = layer.update(keys[:, :, start : start + piece], values[:, :, start : start + piece])
        start += piece
    return out


def plain(handle):
    return handle.dequantize() if isinstance(handle, QuantizedStates) else handle


@pytest.mark.parametrize("sinks", (0, 3))
@pytest.mark.parametrize("window", (0, 5, 64))
@pytest.mark.parametrize("pieces", ([200], [1] * 90, [100, 1, 1, 30, 1, 67], [2, 1, 197]))
def test_exact_tokens_are_exact_and_the_rest_is_quantized_once(sinks, window, pieces):
    layer = TurboQuantLayer(options(nbits=4, sink_length=sinks, residual_length=window), 0)
    keys, values = states(sum(pieces))
    feed(layer, keys, values, pieces)
    length = sum(pieces)
    quantized = slice(sinks, length - window)
    for held, given in ((plain(layer.keys), keys), (plain(layer.values), values)):
        assert held.shape == given.shape
        assert torch.equal(held[:, :, :sinks], given[:, :, :sinks])
        assert torch.equal(held[:, :, length - window :], given[:, :, length - window :])
        error = (held - given)[:, :, quantized].norm() / given[:, :, quantized].norm()
        assert 0.05 < error < 0.25
    assert layer.get_seq_length() == length
    assert layer.tokens.quantized == layer.tokens.codes["values"].length == length - window - sinks


@pytest.mark.parametrize("estimator", ["rescaled", "qjl"])
def test_how_tokens_arrive_does_not_matter(estimator, same_search):
    keys, values = states(300, value_dim=64)
    held = []
    for pieces in ([300], [150, *[1] * 150], [7, 200, 93]):
        layer = TurboQuantLayer(options(nbits=3, residual_length=16, key_estimator=estimator), 0)
        feed(layer, keys, values, pieces)
        held.append((plain(layer.keys), plain(layer.values)))
    for other in held[1:]:
        same = (held[0][0] == other[0]).all(-1).float().mean()
        # products of other shapes may round otherwise, and a joint search end elsewhere
        assert torch.equal(held[0][1], other[1]) and same >= (0.98 if estimator == "qjl" else 1)


def test_the_first_prefill_returns_its_own_states():
    layer = TurboQuantLayer(options(residual_length=16), 0)
    keys, values = states(100)
    out = layer.update(keys, values)
    assert out[0] is keys and out[1] is values
    assert layer.tokens.quantized == 80


def test_a_chunk_longer_than_the_window_is_read_exactly():
    layer = TurboQuantLayer(options(residual_length=16), 0)
    keys, values = states(300)
    out = feed(layer, keys, values, [200, 100])
    assert torch.equal(plain(out[0])[:, :, 200:], keys[:, :, 200:])
    assert not torch.equal(plain(out[0])[:, :, 100:200], keys[:, :, 100:200])
    # the layer itself keeps only the window
    assert not torch.equal(plain(layer.keys)[:, :, 200:284], keys[:, :, 200:284])


KINDS = {"grows": {}, "static": {"max_cache_len": 300}}
MEMORY = (
    {},
    {"condition": "none"},
    {"residual_length": 16},
    {"residual_length": 16, "condition": "none"},
    {"residual_length": 0, "condition": "none"},
)


@pytest.fixture(params=[(kind, options) for kind in KINDS for options in MEMORY], ids=str)
def new_layer(request):
    kind, options = request.param
    return lambda: TurboQuantLayer(TurboQuantConfig(nbits=4, **KINDS[kind], **options), 0)


@pytest.mark.parametrize("attends", (True, False))
@pytest.mark.parametrize(
    "pieces",
    ([200, *[1] * 12], [20, *[1] * 120], [150, 1, 1, 20, 1, 1, 40, 1], [1, 3, 160, 1]),
    ids=("long prompt", "short prompt", "chunks", "one token first"),
)
def test_what_was_taken_may_be_written_to(new_layer, pieces, attends):
    """One buffer for every update, overwritten after attention or, if there is none, at once."""
    kept, fed = new_layer(), new_layer()
    keys, values = states(sum(pieces))
    buffers, start = [x.clone() for x in (keys, values)], 0
    for piece in pieces:
        new = [x[:, :, start : start + piece] for x in (keys, values)]
        for buffer, x in zip(buffers, new, strict=True):
            buffer[:, :, :piece] = x
        start += piece
        given = [buffer[:, :, :piece] for buffer in buffers]
        for layer, taken in ((kept, given), (fed, [x.clone() for x in new])):
            handles = layer.update(*taken)
            if attends:
                query = torch.ones(2, 2, piece, 32)
                torch.nn.functional.scaled_dot_product_attention(query, *handles)
        for buffer in buffers:
            buffer.zero_()
    for ours, expected in ((kept.keys, fed.keys), (kept.values, fed.values)):
        assert torch.equal(plain(ours), plain(expected)) and plain(ours)[:, :, : sum(pieces)].any(-1).all()


def test_what_was_given_stays_what_it_was(new_layer):
    keys, values = states(300)
    layer, given = new_layer(), []
    start = 0

    def go_on(*pieces):
        nonlocal start
        for piece in pieces:
            layer.update(*(x[:, :, start : start + piece] for x in (keys, values)))
            start += piece
            given.extend((x, plain(x).clone()) for x in (layer.keys, layer.values))

    go_on(20, 1, 100, 11, *[1] * 30, 50, *[1] * 5)
    layer.crop(-150)
    start -= 150
    go_on(1, 130)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.offload() if not layer.fixed else None
    go_on(1, 1)
    layer.reset()
    start = 0
    go_on(200, 1)
    for held, was in given:
        assert torch.equal(plain(held), was)


def test_what_update_returned_is_read_before_the_next_one(new_layer):
    keys, values = states(300)
    layer, query = new_layer(), torch.ones(2, 2, 1, 32)
    start, exact = 0, []
    for piece in (1, 10, *[1] * 9, 40, 1, 100, 3, 1, 40):
        handles = layer.update(*(x[:, :, start : start + piece] for x in (keys, values)))
        start += piece
        if isinstance(handles[0], QuantizedStates) and isinstance(handles[0].states, LayerStates):
            layer.get_seq_length()
            assert plain(handles[0])[:, :, :start].any(-1).all()
            read = [lambda h=handles: plain(h[0]), lambda h=handles: h[1].clone()]
            read.append(lambda h=handles: torch.nn.functional.scaled_dot_product_attention(query, *h))
            read.append(lambda h=handles: ops.scores(query, h[0].states, scaling=1.0))
            layer.update(*(x[:, :, start : start + 1] for x in (keys, values)))
            start += 1
            for late in read:
                with pytest.raises(ValueError, match="before the next update or reset .* Keep a `.clone"):
                    late()
        else:
            # exact ones have memory of their own
            exact.append((handles[0], plain(handles[0]).clone()))
    assert exact and all(torch.equal(plain(held), was) for held, was in exact)
    handles = layer.update(*(x[:, :, :1] for x in (keys, values)))
    layer.reset()
    with pytest.raises(ValueError, match="before the next update or reset"):
        plain(handles[0])


def test_pure_streaming_holds_nothing_exact():
    layer = TurboQuantLayer(options(residual_length=0, sink_length=0), 0)
    keys, values = states(140)
    out = feed(layer, keys, values, [100, 1, 39])
    assert layer.tokens.exact.nbytes == 0
    assert layer.tokens.quantized == 140
    assert not torch.equal(plain(out[0])[:, :, -1:], keys[:, :, -1:])


def test_handles_see_what_was_there():
    layer = TurboQuantLayer(options(residual_length=16), 0)
    keys, values = states(120)
    handle = feed(layer, keys, values, [100, 1])[0]
    before = plain(handle)
    layer.offload()
    layer.crop(-50)
    assert handle.shape[2] == 101 and torch.equal(plain(handle), before)


@pytest.mark.parametrize("removed", (0, 1, 7, 16, 17, 60, 97, 98, 100, 500))
def test_crop_keeps_the_rest_and_goes_on(removed):
    layer = TurboQuantLayer(options(residual_length=16, sink_length=3, nbits=8), 0)
    keys, values = states(100)
    feed(layer, keys, values, [60, 30, *[1] * 10])
    before = plain(layer.keys)
    layer.crop(-removed)
    left = max(100 - removed, 0)
    assert layer.get_seq_length() == left
    if left:
        assert torch.equal(plain(layer.keys), before[:, :, :left])
    # tokens cropped from the window are replaced by the new ones, exactly
    more = states(5, seed=1)
    layer.update(*more)
    held = plain(layer.keys)
    assert torch.equal(held[:, :, left:], more[0])
    assert torch.allclose(held[:, :, :left], keys[:, :, :left], atol=0.1)
    for token in range(40):
        layer.update(*states(1, seed=token + 2))
    assert layer.get_seq_length() == left + 45
    assert torch.allclose(plain(layer.keys)[:, :, left : left + 5], more[0], atol=0.1)


def test_appending_never_touches_earlier_codes():
    layer = TurboQuantLayer(options(residual_length=8, nbits=4), 0)
    keys, values = states(400)
    feed(layer, keys, values, [300])
    complete_blocks = layer.tokens.quantized // 128
    before = {
        name: tensor[:, :, :complete_blocks].clone() for name, tensor in layer.tokens.codes["keys"].tensors.items()
    }
    feed(layer, keys[:, :, 300:], values[:, :, 300:], [1] * 90)
    for name, tensor in before.items():
        assert torch.equal(layer.tokens.codes["keys"][name][:, :, :complete_blocks], tensor)


def test_garbage_beyond_the_length_does_not_show():
    layer = TurboQuantLayer(options(residual_length=8, nbits=3), 0)
    keys, values = states(200)
    feed(layer, keys, values, [150])
    clean = plain(layer.keys)
    for buffer in layer.tokens.codes.values():
        used = buffer.length
        for name, tensor in buffer.tensors.items():
            if "plane" not in name:
                tensor.view(*tensor.shape[:2], -1)[:, :, used:] = torch.nan
    assert torch.equal(plain(layer.keys), clean)
    feed(layer, keys[:, :, 150:], values[:, :, 150:], [50])
    assert plain(layer.keys).isfinite().all() and plain(layer.values).isfinite().all()


BAD_UPDATES = {
    "batch": (states(1, batch=3), "must keep the batch size"),
    "heads": (states(1, heads=1), "must keep the batch size"),
    "head_dim": (states(1, head_dim=64), "must keep the batch size"),
    "unequal lengths": ((states(1)[0], states(2)[1]), "must agree in batch, heads, tokens"),
    "no batch": (tuple(t[0] for t in states(1)), "must be a floating-point tensor of shape"),
    "integers": (tuple(t.int() for t in states(1)), "must be a floating-point tensor of shape"),
    "nothing": ((None, None), "must be a floating-point tensor of shape"),
}


@pytest.mark.parametrize("case", BAD_UPDATES)
def test_bad_updates_change_nothing(case):
    layer = TurboQuantLayer(options(residual_length=16), 2)
    feed(layer, *states(100), [100])
    before = plain(layer.keys), plain(layer.values)
    (keys, values), message = BAD_UPDATES[case]
    with pytest.raises(ValueError, match=message) as error:
        layer.update(keys, values)
    assert "at layer 2" in str(error.value)
    assert layer.get_seq_length() == 100
    assert torch.equal(plain(layer.keys), before[0]) and torch.equal(plain(layer.values), before[1])


@pytest.mark.parametrize("capacity", (None, 400))
@pytest.mark.parametrize(
    "dtypes",
    [
        # keys, then values: of the prompt, and of what follows
        (("float32", "bfloat16"), ("float32", "bfloat16")),
        (("float32", "bfloat16"), ("float32", "float32")),
        (("float32", "float32"), ("float32", "bfloat16")),
        (("bfloat16", "bfloat16"), ("float32", "float16")),
    ],
    ids=str,
)
@pytest.mark.parametrize("condition", ("none", "attention"))
def test_each_role_has_its_own_dtype(capacity, dtypes, condition):
    """As under autocast, which may begin or end between two updates: the dtypes that torch.cat would give."""
    layer = TurboQuantLayer(
        TurboQuantConfig(residual_length=16, nbits=4, max_cache_len=capacity, condition=condition), 0
    )
    # not a DynamicLayer: that of transformers 5.17 starts with an empty tensor of the keys' dtype for both
    full, start = None, 0
    keys, values = states(300, value_dim=64)
    for index, piece in enumerate([150, 1, 1, 12, 30, 1, 1]):
        chosen = [getattr(torch, dtype) for dtype in dtypes[index > 0]]
        new = [x[:, :, start : start + piece].to(dtype) for x, dtype in zip((keys, values), chosen, strict=True)]
        start += piece
        full = new if full is None else [torch.cat(pair, dim=2) for pair in zip(full, new, strict=True)]
        handles, expected = layer.update(*new), full
        assert [x.dtype for x in handles] == [x.dtype for x in expected]
        # what is read differs from what was given by the error of codes alone, and not at all in the window
        for held, given in zip((layer.keys, layer.values), expected, strict=True):
            assert held.dtype == given.dtype
            assert torch.equal(plain(held)[:, :, start - 16 : start], given[:, :, start - 16 :])
            assert (plain(held)[:, :, :start] - given).norm() < 0.15 * given.norm()
    assert len(layer.tokens.codes["keys"].tensors) > 1 and layer.tokens.quantized == start - 20


def test_autocast_does_not_round_codes():
    keys, values = states(200)
    held = []
    for enabled in (False, True):
        layer = TurboQuantLayer(options(residual_length=16, nbits=8), 0)
        with torch.autocast("cpu", enabled=enabled):
            feed(layer, keys, values, [100, 1, 99])
            held.append((plain(layer.keys), plain(layer.values)))
            query = torch.ones(2, 2, 1, 32)
            held[-1] += (
                ops.attention(query, layer.tokens.read(), scaling=1.0),
                ops.scores(query, layer.tokens.read(), scaling=1.0),
            )
    assert all(map(torch.equal, *held))


@pytest.mark.parametrize("sizes", [(8, 8), (32, 8), (18, 32)])
@pytest.mark.parametrize("condition", ["attention", "none"])
def test_head_dims_without_codes_are_refused_before_anything_is_made(sizes, condition):
    layer = TurboQuantLayer(TurboQuantConfig(condition=condition), 0)
    with pytest.raises(ValueError, match="`head_dim` must be a multiple of 4, 16 at least"):
        layer.update(*(states(5, head_dim=size)[0] for size in sizes))
    assert not layer.is_initialized and layer.keys is None


@pytest.mark.parametrize("tokens", (1, 700))
def test_buffers_of_keys_and_values_grow_together(monkeypatch, tokens):
    """The kernels take the capacity of one for that of both: otherwise they would write beyond the other."""
    layer = TurboQuantLayer(options(residual_length=0, sink_length=0), 0)
    keys, values = states(1100)
    layer.update(keys[:, :, :256], values[:, :, :256])
    buffers = layer.tokens.codes
    # a step grows them where a block is full
    filled = 256 if tokens == 700 else buffers["keys"].capacity
    layer.update(keys[:, :, 256:filled], values[:, :, 256:filled]) if filled > 256 else None
    before, reserve = buffers["keys"].capacity, TokenBuffer.reserve

    def fail(buffer, tokens, limit=None):
        if buffer is layer.tokens.codes["values"]:
            raise torch.OutOfMemoryError("no memory left")
        reserve(buffer, tokens, limit)

    monkeypatch.setattr(TokenBuffer, "reserve", fail)
    with pytest.raises(torch.OutOfMemoryError):
        layer.update(keys[:, :, filled : filled + tokens], values[:, :, filled : filled + tokens])
    assert {buffer.capacity for buffer in layer.tokens.codes.values()} == {before}
    monkeypatch.undo()
    layer.update(keys[:, :, filled : filled + tokens], values[:, :, filled : filled + tokens])
    capacities = {buffer.capacity for buffer in layer.tokens.codes.values()}
    assert len(capacities) == 1 and capacities.pop() > before


@pytest.mark.parametrize("fails_at", (0, 1))
def test_running_out_of_memory_changes_nothing(monkeypatch, fails_at):
    layer = TurboQuantLayer(options(residual_length=16, nbits=3), 0)
    keys, values = states(300)
    feed(layer, keys, values, [200])
    before = plain(layer.keys), plain(layer.values)
    calls = []
    quantize = reference._quantize

    def fail(*args):
        calls.append(args)
        # the second call is for the values: the keys are already in their buffer then
        if len(calls) > fails_at:
            raise torch.OutOfMemoryError("no memory left")
        return quantize(*args)

    monkeypatch.setattr(reference, "_quantize", fail)
    with pytest.raises(torch.OutOfMemoryError):
        layer.update(keys[:, :, 200:], values[:, :, 200:])
    assert len(calls) == fails_at + 1
    assert torch.equal(plain(layer.keys), before[0]) and torch.equal(plain(layer.values), before[1])
    monkeypatch.undo()
    layer.update(keys[:, :, 200:], values[:, :, 200:])
    fresh = TurboQuantLayer(options(residual_length=16, nbits=3), 0)
    feed(fresh, keys, values, [300])
    assert torch.equal(plain(layer.keys), plain(fresh.keys)) and torch.equal(plain(layer.values), plain(fresh.values))


def test_keys_and_values_cannot_be_assigned():
    layer = TurboQuantLayer(options(), 0)
    with pytest.raises(ValueError, match="cannot be assigned"):
        layer.keys = torch.zeros(1)


def test_reset_frees_everything():
    layer = TurboQuantLayer(options(residual_length=16), 0)
    feed(layer, *states(100), [100])
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.keys is None and not layer.tokens.codes
    # another batch is fine after a reset
    layer.update(*states(50, batch=1))
    assert layer.get_seq_length() == 50


def test_a_step_after_wider_ones_is_widened_too():
    keys, values = states(150)
    layer = TurboQuantLayer(options(residual_length=16), 0)
    layer.update(keys[:, :, :140].bfloat16(), values[:, :, :140].bfloat16())
    # in turns, as where autocast begins and ends
    for at in range(140, 150):
        dtype = torch.bfloat16 if at % 2 == 0 else torch.float32
        held = layer.update(keys[:, :, at : at + 1].to(dtype), values[:, :, at : at + 1].to(dtype))
        assert held[0].dtype == layer.tokens.exact["keys"].dtype == (torch.bfloat16 if at == 140 else torch.float32)
