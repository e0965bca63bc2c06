"""Offloading: the right layers wait on the host, and nothing reads them there."""

import copy
import inspect

import pytest
import torch
from test_saving import CONFIG, OPTIONS, TINY, go_on, held, make_model, same, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from hf_turboquant import TurboQuantCache, TurboQuantConfig
from hf_turboquant.hybrid import TurboQuantHybridLayer
from hf_turboquant.layer import TurboQuantLayer


class NoStream:
    """Stands for a CUDA stream where there is none."""

    def wait_stream(self, other):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *error):
        pass


@pytest.fixture
def copies(monkeypatch):
    """
    A host that computes nothing: what waits there has its bits inverted. The copies made, as (layer, where to).
    """
    log = []

    def invert(tensor):
        return (~tensor.contiguous().view(torch.uint8)).view(tensor.dtype)

    def copy_inverted(layer, device):
        layer._map_tokens(invert)
        log.append((layer.layer_idx, "host" if device == "cpu" and isinstance(device, str) else "device"))

    monkeypatch.setattr(TurboQuantLayer, "_copy", copy_inverted)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: NoStream())
    return log


def offloading_cache(config, monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        cache = TurboQuantCache(config, offloading=True, **{**OPTIONS, **options})
    cache.prefetch_stream = NoStream()
    return cache


def on_host(cache):
    return [getattr(layer, "on_host", None) for layer in cache.layers]


def prefill(model, *caches, length=150):
    with torch.no_grad():
        for cache in caches:
            model(tokens(length), past_key_values=cache)


@pytest.mark.parametrize("condition", ("attention", "none"))
@pytest.mark.parametrize("with_config", (True, False))
def test_the_next_layer_is_fetched_ahead(with_config, condition, copies, monkeypatch):
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=3, **TINY)
    model = LlamaForCausalLM(config).eval()
    given = config if with_config else None
    cache = offloading_cache(given, monkeypatch, condition=condition)
    plain = TurboQuantCache(given, **{**OPTIONS, "condition": condition})
    prefill(model, cache, plain, length=250)
    # codes made when attention ran went as well; the last update fetches the first layer for the next token
    assert cache.layers[0].codes["keys"].length == 230 and cache.layers[2].pending is None
    assert on_host(cache) == [False, True, True] and cache.layers[0].condition == condition
    copies.clear()
    with torch.no_grad():
        ids = tokens(1)
        out = [model(ids, past_key_values=each).logits for each in (cache, plain)]
    assert torch.equal(*out)
    assert copies == [(1, "device"), (0, "host"), (2, "device"), (1, "host"), (0, "device"), (2, "host")]
    # long enough for buffers to grow
    assert torch.equal(go_on(model, cache, 40), go_on(model, plain, 40))
    assert cache.layers[0].codes["keys"].length > 256
    assert same(cache, plain) and on_host(cache) == [False, True, True]


@pytest.mark.parametrize("only_non_sliding", (True, False))
def test_sliding_layers(only_non_sliding, copies, monkeypatch):
    model = make_model("gemma3")
    cache = offloading_cache(model.config, monkeypatch, offload_only_non_sliding=only_non_sliding)
    plain = TurboQuantCache(model.config, **OPTIONS)
    offloaded = []
    for layer in cache.layers[:2]:
        layer.offload = lambda: offloaded.append("sliding")
    prefill(model, cache, plain)
    assert torch.equal(go_on(model, cache), go_on(model, plain))
    assert bool(offloaded) != only_non_sliding
    assert cache.layers[2].codes["keys"].length == 136 and (2, "host") in copies


CHANGES = {
    "crop": lambda c: c.crop(-30),
    "crop a lot": lambda c: c.crop(-149),
    "reorder": lambda c: c.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda c: c.batch_repeat_interleave(2),
    "select": lambda c: c.batch_select_indices(torch.tensor([1])),
    "reset": lambda c: c.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_while_tokens_wait_on_the_host(change, copies, monkeypatch):
    model = make_model("llama")
    cache, plain = offloading_cache(CONFIG, monkeypatch), TurboQuantCache(CONFIG, **OPTIONS)
    prefill(model, cache, plain)
    before = on_host(cache)
    copies.clear()
    for each in (cache, plain):
        CHANGES[change](each)
    # the rows of a batch are moved on the device: on the host, copies may still be under way
    assert copies == ([] if change in ("crop", "crop a lot", "reset") else [(1, "device"), (1, "host")])
    assert before == [False, True] and on_host(cache) == ([False, False] if change == "reset" else before)
    if change == "reset":
        assert held(cache) == [(None, None)] * 2
    else:
        assert same(cache, plain) and on_host(cache) == before
    ids = tokens(9, batch={"repeat": 4, "select": 1}.get(change, 2))
    with torch.no_grad():
        assert torch.equal(*(model(ids, past_key_values=each).logits for each in (cache, plain)))


def test_a_handle_keeps_what_it_reads(copies, monkeypatch):
    cache, plain = offloading_cache(CONFIG, monkeypatch), TurboQuantCache(CONFIG, **OPTIONS)
    handles = []
    for each in (cache, plain):
        generator = torch.Generator().manual_seed(0)
        for count in (100, 1):
            handles.append([each.update(*torch.randn(2, 2, 2, count, 32, generator=generator), i) for i in (0, 1)])
    assert on_host(cache) == [True, True] or on_host(cache) == [False, True]
    for ours, theirs in zip(handles[1], handles[3], strict=True):
        assert torch.equal(ours[0].dequantize(), theirs[0].dequantize())
        assert torch.equal(ours[1].dequantize(), theirs[1].dequantize())


def test_tokens_that_wait_for_their_query_are_offloaded_with_it(copies):
    layer = TurboQuantLayer(TurboQuantConfig(residual_length=16), 0)
    keys, values = layer.update(*torch.randn(2, 1, 2, 100, 32))
    layer.offload()
    assert layer.pending is not None and not layer.on_host and copies == []
    torch.nn.functional.scaled_dot_product_attention(torch.randn(1, 2, 100, 32), keys, values)
    assert layer.on_host and copies == [(0, "host")] and layer.codes["keys"].length == 80
    # and an offload that was taken back does not come later
    layer = TurboQuantLayer(TurboQuantConfig(residual_length=16), 1)
    layer.update(*torch.randn(2, 1, 2, 100, 32))
    layer.offload()
    layer.prefetch()
    assert layer.pending is not None
    layer.settle()
    assert not layer.on_host and len(copies) == 1


def test_an_update_fetches_what_was_not_fetched_ahead(copies):
    layers = [TurboQuantLayer(TurboQuantConfig(residual_length=16, condition="none"), 0) for _ in range(2)]
    for count in (100, 30, 1):
        states = torch.randn(2, 1, 2, count, 32)
        for layer in layers:
            layer.update(*states)
        layers[0].offload()
        assert layers[0].on_host
    assert torch.equal(layers[0].keys.dequantize(), layers[1].keys.dequantize())
    assert torch.equal(layers[0].values.dequantize(), layers[1].values.dequantize())


def test_recurrent_states_stay(copies):
    layer = TurboQuantHybridLayer(TurboQuantConfig(residual_length=16, condition="none"), 0)
    layer.update(*torch.randn(2, 1, 2, 100, 32))
    layer.update_conv_state(torch.ones(1, 8, 4))
    state = layer.conv_states[0]
    layer.offload()
    assert layer.on_host and layer.conv_states[0] is state
    layer.prefetch()
    assert not layer.on_host and layer.conv_states[0] is state


def test_copies_and_saves_of_an_offloading_cache(copies, monkeypatch, tmp_path):
    model = make_model("llama")
    cache, plain = offloading_cache(CONFIG, monkeypatch), TurboQuantCache(CONFIG, **OPTIONS)
    prefill(model, cache, plain)
    cache.layers[0].offload()
    assert same(copy.deepcopy(cache), plain) and cache.memory().total_bytes == plain.memory().total_bytes
    # files are written from the host as it is
    for layer in cache.layers:
        layer.prefetch()
    monkeypatch.setattr(TurboQuantLayer, "_copy", lambda layer, device: copies.append(device))
    for layer in cache.layers:
        layer.offload()
    copies.clear()
    cache.save_pretrained(tmp_path)
    assert on_host(cache) == [True, True] and copies == []
    assert same(TurboQuantCache.from_pretrained(tmp_path), plain)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        loaded = TurboQuantCache.from_pretrained(tmp_path, config=CONFIG, offloading=True)
    loaded.prefetch_stream = NoStream()
    assert on_host(loaded) == [True, True] and loaded.offloading and copies == ["cpu", "cpu"]
    assert torch.equal(go_on(model, loaded), go_on(model, plain))


def test_the_signature_shows_it():
    for make in (TurboQuantCache, TurboQuantCache.from_pretrained):
        parameters = inspect.signature(make).parameters
        assert parameters["offloading"].default is parameters["offload_only_non_sliding"].default is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_reason_is_told():
    with pytest.raises(ValueError, match="`offloading=True` needs a CUDA device"):
        TurboQuantCache(CONFIG, offloading=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies between GPU and host need a GPU")
@pytest.mark.parametrize("family", ("llama", "gemma3", "qwen3_next"))
def test_on_a_gpu(family, tmp_path):
    model = make_model(family).cuda()
    ids = tokens(400).cuda()
    outputs = []
    for offloading in (False, True, True):
        cache = TurboQuantCache(model.config, offloading=offloading, **OPTIONS)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=60, min_new_tokens=60
        )
        outputs.append(out)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    waiting = [layer for layer in cache.layers if getattr(layer, "on_host", False)]
    resident = [layer for layer in cache.layers if getattr(layer, "on_host", None) is False]
    assert len(resident) == 1 and len(waiting) == (1 if family == "llama" else 0)
    for layer in waiting:
        tensors = [t for b in (*layer.codes.values(), layer.exact) for t in b.tensors.values()]
        assert all(t.device.type == "cpu" and t.is_pinned() for t in tensors)
    cache.save_pretrained(tmp_path)
    loaded = TurboQuantCache.from_pretrained(tmp_path, config=model.config, device="cuda", offloading=True)
    more = torch.cat([outputs[0], ids[:, :5]], dim=1)
    again = [
        model.generate(more, attention_mask=torch.ones_like(more), past_key_values=each, max_new_tokens=20)
        for each in (cache, loaded)
    ]
    assert torch.equal(*again)
