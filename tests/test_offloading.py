"""Offloading: the tokens of a layer wait on the CPU, are fetched ahead, and nobody reads them before they arrived."""

import copy
import pickle

import pytest
import torch
from test_models import GREEDY, PROMPT, ROWS, SMALL_WINDOW, Row, compressed_layers
from torch.utils._pytree import tree_leaves

from hf_turboquant import QuantizedStates, TurboQuantCache
from hf_turboquant._supported import cache_name
from hf_turboquant.tokens import ROLES

pytestmark = pytest.mark.usefixtures("early_learning")
by_name = {row.name: row for row in ROWS}
# full attention alone; beside sliding layers, recurrent layers, shared layers; recurrent states in the same layer
NAMES = ("llama_gqa", "gemma3", "qwen3_next", "gemma4", "falcon_h1", "mistral_sliding")


def plain(tensor):
    return tensor.dequantize() if isinstance(tensor, QuantizedStates) else tensor


class Stream:
    """A stream that is as late as a stream may be: a copy delivers only when another stream waits for it."""

    current, all = None, []

    def __init__(self):
        self.copies = []
        Stream.all.append(self)

    def wait_stream(self, other):
        other.finish()

    def finish(self):
        for copy_now in self.copies:
            copy_now()
        self.copies.clear()

    def __enter__(self):
        self.before, Stream.current = Stream.current, self

    def __exit__(self, *error):
        Stream.current = self.before


class OnTheHost(torch.Tensor):
    """What was moved to the CPU, and must not meet tensors of the GPU."""

    device = torch.device("meta")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__deepcopy__:
            return args[0].as_subclass(torch.Tensor).clone().as_subclass(cls)
        others = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        assert all(isinstance(tensor, OnTheHost) for tensor in others), f"{func} of tensors of two devices"
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def gpu(monkeypatch):
    """The CPU plays the GPU. Yields the number of copies in each direction."""
    default, counts, to = Stream(), {"offloaded": 0, "fetched": 0}, torch.Tensor.to
    Stream.current = default

    def move(tensor, *args, non_blocking=False, **kwargs):
        if not non_blocking:
            if args == (OnTheHost.device,):
                # indices that follow what they select from; this copy is waited for
                default.finish()
                return tensor.as_subclass(OnTheHost)
            return to(tensor, *args, **kwargs)
        on_host = args == ("cpu",)
        assert isinstance(tensor, OnTheHost) != on_host
        source = tensor.as_subclass(torch.Tensor)
        if Stream.current is default:
            default.finish()
        # reads at once what is there by now, and delivers late
        value, late = source.clone(), torch.empty_like(source).view(torch.uint8).fill_(255).view(source.dtype)
        if Stream.current is default and not on_host:
            # a stream sees its own copies
            late.copy_(value)
        else:
            Stream.current.copies.append(lambda: late.copy_(value))
        counts["offloaded" if on_host else "fetched"] += 1
        return late.as_subclass(OnTheHost) if on_host else late

    monkeypatch.setattr(torch.Tensor, "to", move)
    monkeypatch.setattr(torch, "Stream", Stream)
    for name, function in {
        "is_available": lambda: True,
        "Stream": Stream,
        "default_stream": lambda device=None: default,
        "current_stream": lambda device=None: Stream.current,
        "synchronize": lambda device=None: [stream.finish() for stream in Stream.all],
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    yield counts
    Stream.current, Stream.all = None, []


@pytest.mark.parametrize("only_non_sliding", (False, True))
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_before_it_arrives(gpu, name, only_non_sliding):
    row = by_name[name]
    if only_non_sliding and row.compressed == 0:
        pytest.skip("transformers itself fails where no layer is offloaded")
    model = row.model()
    expected = row.prefill_and_decode(model, row.cache(model.config, **SMALL_WINDOW))
    cache = row.cache(model.config, **SMALL_WINDOW, offloading=True, offload_only_non_sliding=only_non_sliding)
    assert torch.equal(row.prefill_and_decode(model, cache), expected)
    assert gpu["offloaded"] and gpu["fetched"]
    # all are away but the one that is needed next
    assert count_on_host(cache) >= row.compressed - 1


def count_on_host(cache):
    return sum(isinstance(layer.tokens.exact["keys"], OnTheHost) for layer in compressed_layers(cache))


def test_an_only_layer(gpu):
    row = Row("llama", 1, {"num_hidden_layers": 1})
    model = row.model()
    expected = row.prefill_and_decode(model, row.cache(model.config, **SMALL_WINDOW))
    cache = row.cache(model.config, **SMALL_WINDOW, offloading=True)
    assert torch.equal(row.prefill_and_decode(model, cache), expected)
    assert gpu["fetched"]


def test_what_waits_for_its_query_leaves_with_the_prefill(gpu):
    """After the first prefill only codes are left, and they are on the CPU."""
    row = by_name["llama_gqa"]
    model = row.model()
    cache = row.cache(model.config, **SMALL_WINDOW, offloading=True)
    with torch.no_grad():
        model(row.inputs()["input_ids"][:, :PROMPT], **{cache_name(model): cache})
    assert [layer.condition for layer in cache.layers] == ["attention"] * 3
    # the first layer is back already
    assert count_on_host(cache) == 2 and all(layer.pending is None for layer in cache.layers)
    assert cache.memory().codes_bytes > 0


@pytest.mark.parametrize("way", ("beams", "twin", "saved", "cropped"))
def test_other_operations_bring_tokens_back(gpu, way, tmp_path):
    row = by_name["gemma3"]
    model, inputs = row.model(), row.inputs()
    results = []
    for offloading in (False, True):
        cache = row.cache(model.config, **SMALL_WINDOW, offloading=offloading)
        options = {"num_beams": 3} if way == "beams" else {}
        first = model.generate(
            **{n: t[:, :PROMPT] for n, t in inputs.items()}, **{cache_name(model): cache}, **GREEDY | options
        )
        if offloading:
            assert count_on_host(cache)
        if way == "twin":
            cache = copy.deepcopy(cache)
        elif way == "saved":
            cache.save_pretrained(tmp_path / "cache")
            cache = TurboQuantCache.from_pretrained(tmp_path / "cache", config=model.config)
        elif way == "cropped":
            cache.layers[1].crop(-2), cache.layers[3].crop(-2)
        # of the layers' own tokens, asked for one by one
        results.append([first, *(plain(getattr(layer, role)) for layer in compressed_layers(cache) for role in ROLES)])
    for ours, expected in zip(*reversed(results), strict=True):
        assert torch.equal(ours, expected)


def test_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="`offloading` must be False without a CUDA GPU"):
        TurboQuantCache(offloading=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to offload from")
@pytest.mark.parametrize("name", NAMES)
def test_same_tokens_on_a_gpu(name):
    """Often enough that a copy would once be late."""
    row = by_name[name]
    model = row.model().cuda()
    inputs = {name: tensor[:, :PROMPT].cuda() for name, tensor in row.inputs().items()}
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    expected = model.generate(**inputs, **{cache_name(model): row.cache(model.config, **SMALL_WINDOW)}, **options)
    for _ in range(5):
        cache = row.cache(model.config, **SMALL_WINDOW, offloading=True)
        assert torch.equal(model.generate(**inputs, **{cache_name(model): cache}, **options), expected)
        away = [
            layer.tokens.exact["keys"] for layer in compressed_layers(cache) if not layer.tokens.exact["keys"].is_cuda
        ]
        assert len(away) >= row.compressed - 1 and all(tensor.is_pinned() for tensor in away)
        twin = pickle.loads(pickle.dumps(cache))
        one_more = [model(inputs["input_ids"][:, :1], **{cache_name(model): each}).logits for each in (cache, twin)]
        assert torch.equal(*one_more)
