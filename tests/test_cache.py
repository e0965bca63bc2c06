"""The drop-in: the same calls on `DynamicCache` and on ours."""

import copy
import inspect
import pickle

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3NextConfig
from transformers.cache_utils import DynamicLayer

import hf_turboquant
from hf_turboquant import QuantizedStates, TurboQuantCache
from hf_turboquant.layer import TurboQuantLayer

pytestmark = pytest.mark.usefixtures("early_learning")

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=99,
    max_position_embeddings=2048,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
# 8 bits, everything quantised: close to exact, and nothing is close by accident
STREAMING = {"nbits": 8, "residual_length": 0, "sink_length": 0}


def precise_cache():
    """All 8 bits of the keys in the codes: greedy tokens stay those of full precision."""
    return TurboQuantCache(CONFIG, nbits=8, key_estimator="rescaled", residual_length=8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def tokens(tokens, batch=2, seed=0):
    return torch.randint(3, 99, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def states(length, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 2, length, 32, generator=generator) for _ in range(2)]


def fill(cache, *lengths):
    for seed, length in enumerate(lengths):
        for layer in range(2):
            cache.update(*states(length, 10 * seed + layer), layer)


def plain(tensor):
    return tensor.dequantize() if isinstance(tensor, QuantizedStates) else tensor


# every public method of a layer and of a cache, as calls; what they return is compared as well
CALLS = {
    "update": lambda c: [list(t.shape) for t in c.update(*states(3, 7), 0)],
    "get_seq_length": lambda c: (c.get_seq_length(), c.get_seq_length(1), c.get_seq_length(99)),
    "get_max_length": lambda c: (c.get_max_length(), c.get_max_length(0)),
    "get_mask_sizes": lambda c: (c.get_mask_sizes(1, 0), c.get_mask_sizes(5, 1), c.get_mask_sizes(5, 99)),
    "get_query_offset": lambda c: c.get_query_offset(),
    "reset": lambda c: c.reset(),
    "reset and go on": lambda c: (c.reset(), fill(c, 9)),
    "crop": lambda c: c.crop(-7),
    "crop nothing": lambda c: c.crop(0),
    "crop everything": lambda c: c.crop(-500),
    "crop everything and go on": lambda c: (c.crop(-500), fill(c, 9, 1)),
    "crop and go on": lambda c: (c.crop(-7), fill(c, 5, 1)),
    "crop to a length": lambda c: c.crop(20),
    "reorder_cache": lambda c: c.reorder_cache(torch.tensor([1, 1])),
    "batch_repeat_interleave": lambda c: c.batch_repeat_interleave(3),
    "batch_select_indices": lambda c: c.batch_select_indices(torch.tensor([1])),
    "batch_select_indices by mask": lambda c: c.batch_select_indices(torch.tensor([True, False])),
    "offload": lambda c: [layer.offload() for layer in c.layers],
    "prefetch": lambda c: [(layer.offload(), layer.prefetch()) for layer in c.layers],
    "lazy_initialization": lambda c: [
        (layer.reset(), layer.lazy_initialization(*states(0)), layer.get_seq_length()) for layer in c.layers
    ][0][2],
    "early_initialization": lambda c: (c.reset(), c.early_initialization(2, 2, 32, torch.float32, "cpu"))[1],
    "early_initialization and go on": lambda c: (
        (c.reset(), c.early_initialization(2, 2, 32, torch.float32, "cpu"), fill(c, 9, 1))[1]
    ),
    "is_initialized": lambda c: c.is_initialized,
    "is_compileable": lambda c: c.is_compileable,
    "is_croppable": lambda c: c.is_croppable,
    "is_sliding": lambda c: c.is_sliding,
    "is_linear": lambda c: c.is_linear,
    "is_dummy": lambda c: getattr(c, "is_dummy", None),
    "batch_size": lambda c: c.batch_size,
    "activate_past_recording": lambda c: c.activate_past_recording(),
    "is_recording_past": lambda c: c.is_recording_past(0) if hasattr(c, "is_recording_past") else None,
    "has_previous_state": lambda c: c.has_previous_state(),
    "update_conv_state": lambda c: c.update_conv_state(torch.zeros(2, 3, 4), 0),
    "update_recurrent_state": lambda c: c.update_recurrent_state(torch.zeros(2, 3, 4), 0),
    "get_conv_state": lambda c: c.get_conv_state(0),
    "get_recurrent_state": lambda c: c.get_recurrent_state(0),
    "update_indexer": lambda c: c.update_indexer(torch.zeros(2, 3, 4), 0),
    "__len__": lambda c: len(c),
    "__iter__": lambda c: [len(item) for item in c],
    "deepcopy": lambda c: copy.deepcopy(c).get_seq_length(),
    "pickle": lambda c: pickle.loads(pickle.dumps(c)).get_seq_length(),
}

# in transformers 5.17 DynamicLayer.reset keeps the length and crop fails on an empty layer; ours does neither
if "reset" not in vars(DynamicLayer):
    COMPARED = [call for call in CALLS if "reset" not in call and "early_initialization" not in call]
    COMPARED_EMPTY = ["__len__", "__iter__", "get_seq_length", "reorder_cache"]
else:
    COMPARED = list(CALLS)
    COMPARED_EMPTY = ["__len__", "__iter__", "get_seq_length", "crop", "reset", "reorder_cache"]


@pytest.mark.parametrize("with_config", (True, False))
@pytest.mark.parametrize("call", COMPARED)
def test_contract(call, with_config):
    config = CONFIG if with_config else None
    outcomes = []
    for cache in (DynamicCache(config=config), TurboQuantCache(config, **STREAMING)):
        fill(cache, 40, 1, 6)
        try:
            result = CALLS[call](cache)
        except Exception as error:
            result = type(error)
        held = [[plain(t) for t in (k, v)] if k is not None else None for k, v, _ in cache]
        # an initialised layer of the reference without tokens holds tensors of no shape
        held = [None if pair is None or pair[0].numel() == 0 else pair for pair in held]
        outcomes.append((result, [cache.get_seq_length(i) for i in range(2)], held))
    (expected, lengths, reference), (result, our_lengths, ours) = outcomes
    assert result == expected and our_lengths == lengths
    for pair, our_pair in zip(reference, ours, strict=True):
        assert (pair is None) == (our_pair is None)
        for tensor, our_tensor in zip(pair or (), our_pair or (), strict=True):
            assert tensor.shape == our_tensor.shape and tensor.dtype == our_tensor.dtype
            # 8 bits: .6 % of a vector's norm, which is about √32
            assert (tensor - our_tensor).abs().max() < 0.25
            assert (tensor - our_tensor).norm() < 0.015 * tensor.norm()


def test_the_contract_covers_every_public_method():
    names = {
        name
        for owner in (DynamicLayer, DynamicCache)
        for name, member in inspect.getmembers(owner)
        if not name.startswith("_") and (callable(member) or isinstance(member, property))
    }
    # deprecated in 5.17 and gone since
    names -= {"get_max_cache_shape", "max_cache_len", "max_batch_size"}
    assert names - {call.split(" ")[0] for call in CALLS} == set()


@pytest.mark.parametrize("method", COMPARED_EMPTY)
def test_contract_before_the_first_token(method):
    results = []
    for cache in (DynamicCache(config=CONFIG), TurboQuantCache(CONFIG)):
        results.append((CALLS[method](cache), cache.get_seq_length()))
    assert results[0] == results[1]


@pytest.mark.parametrize("heads", (1, 2, 4))
@pytest.mark.parametrize("pieces", ([48], [30, 1, 1, 16], [1] * 48))
def test_logits_match_full_precision(heads, pieces):
    """MQA, GQA and MHA; prefill, chunks and steps; a row padded on the left."""
    torch.manual_seed(1)
    config = copy.deepcopy(CONFIG)
    config.num_key_value_heads = heads
    model = LlamaForCausalLM(config).eval()
    ids, mask = tokens(50), torch.ones(2, 50, dtype=torch.long)
    mask[0, :9] = 0
    logits = []
    for cache in (DynamicCache(config=config), TurboQuantCache(config, **STREAMING)):
        start = 0
        for piece in (*pieces, 1, 1):
            with torch.no_grad():
                stop = start + piece
                out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits
            start = stop
        logits.append(out)
    assert cache.layers[0].codes["keys"].length == 50
    assert (logits[1] - logits[0]).norm() < 0.02 * logits[0].norm()


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=("greedy", "sampling", "beams", "prompt lookup"),
)
def test_generate_as_with_a_dynamic_cache(model, options):
    ids = tokens(40, batch=1 if "prompt_lookup_num_tokens" in options else 2)
    outputs = []
    for cache in (
        DynamicCache(config=CONFIG),
        precise_cache(),
    ):
        torch.manual_seed(0)
        outputs.append(
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, past_key_values=cache, **options
            )
        )
    assert cache.layers[0].codes["keys"].length > 20
    assert torch.equal(*outputs)


@pytest.mark.parametrize("first", (torch.inference_mode, torch.no_grad, torch.enable_grad))
@pytest.mark.parametrize("then", (torch.inference_mode, torch.no_grad, torch.enable_grad))
def test_modes_may_change_between_calls(model, first, then):
    ids, logits = tokens(60), []
    for cache in (DynamicCache(config=CONFIG), precise_cache()):
        with first():
            model(ids[:, :40], past_key_values=cache)
            model(ids[:, 40:41], past_key_values=cache)
            cache.reorder_cache(torch.tensor([1, 0]))
        with then():
            model(ids[:, 41:42], past_key_values=cache)
            logits.append(model(ids[:, 42:60], past_key_values=cache).logits.detach())
    assert (logits[1] - logits[0]).norm() < 0.02 * logits[0].norm()
    for buffer in (*cache.layers[0].codes.values(), cache.layers[0].exact):
        assert not any(tensor.requires_grad or tensor.is_inference() for tensor in buffer.tensors.values())


def test_left_padding_in_generate(model):
    ids, mask = tokens(40), torch.ones(2, 40, dtype=torch.long)
    ids[0, :13], mask[0, :13] = 0, 0
    outputs = [
        model.generate(ids, attention_mask=mask, max_new_tokens=12, past_key_values=cache)
        for cache in (
            DynamicCache(config=CONFIG),
            precise_cache(),
        )
    ]
    assert torch.equal(*outputs)


def test_several_turns_with_one_cache(model):
    outputs = []
    for cache in (
        DynamicCache(config=CONFIG),
        precise_cache(),
    ):
        conversation = tokens(20, batch=1)
        for turn in range(3):
            conversation = torch.cat([conversation, tokens(15, batch=1, seed=turn)], dim=1)
            conversation = model.generate(
                conversation,
                attention_mask=torch.ones_like(conversation),
                max_new_tokens=8,
                min_new_tokens=8,
                past_key_values=cache,
            )
        outputs.append(conversation)
    assert torch.equal(*outputs)
    assert cache.get_seq_length() == outputs[0].shape[1] - 1


def test_only_full_attention_is_compressed_in_a_hybrid():
    config = Qwen3NextConfig(num_hidden_layers=8)
    cache = TurboQuantCache(config)
    ours = [i for i, layer in enumerate(cache.layers) if isinstance(layer, TurboQuantLayer)]
    assert ours == [3, 7]
    for layer, expected in zip(cache.layers, DynamicCache(config=config).layers, strict=True):
        assert type(layer) is type(expected) or isinstance(layer, TurboQuantLayer)
    assert "2 of 8 layers compressed: 3, 7" in repr(cache)
    assert "keys 4 bits qjl" in repr(cache) and "6 × LinearAttentionLayer" in repr(cache)


@pytest.mark.parametrize(("skip", "kept"), [((0,), {0}), ((-1,), {1}), ((0, -1), {0, 1}), ((), set())])
def test_skipped_layers_stay_in_full_precision(skip, kept):
    cache = TurboQuantCache(CONFIG, skip_layers=skip)
    assert {i for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer} == kept


def test_layers_are_made_lazily_without_a_config():
    cache = TurboQuantCache(skip_layers=(1,))
    assert len(cache) == 0 and "no layer yet" in repr(cache)
    fill(cache, 5)
    assert [type(layer) for layer in cache.layers] == [TurboQuantLayer, DynamicLayer]
    assert cache.layers[0].layer_idx == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": CONFIG, "skip_layers": (2,)}, "`skip_layers` must be from -2 to 1 for this model"),
        ({"skip_layers": (-1,)}, "Negative `skip_layers` need the model's `config`"),
        ({"config": "llama"}, "`config` must be the model's config, got str"),
        ({"config": CONFIG, "nbits": 9}, "`nbits` must be 2, 2.5, 3, 3.5, 4 or 8, got 9"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TurboQuantCache(**arguments)


def test_signature_shows_every_option():
    parameters = inspect.signature(TurboQuantCache).parameters
    assert list(parameters)[:3] == ["config", "nbits", "key_bits"]
    assert parameters["residual_length"].default == 128 and parameters["key_estimator"].default == "qjl"


@pytest.mark.parametrize(("nbits", "ratio"), [(4, 3.6), (3, 4.6), (2, 6.5)])
@pytest.mark.parametrize("steps", (0, 300))
def test_compression_of_32k_tokens(nbits, ratio, steps):
    """head_dim 128, fp16: everything counted, right after a prefill and with the slack of decoding."""
    cache = TurboQuantCache(nbits=nbits)
    states = torch.randn(1, 2, 32_768 - steps, 128, dtype=torch.float16)
    cache.update(states, states, 0)
    for token in states[:, :, :steps].split(1, dim=2):
        cache.update(token, token, 0)
    report = cache.memory()
    assert report.full_bytes == 2 * 2 * 32_768 * 128 * 2
    assert report.codes_bytes == 2 * 2 * (32_768 - 132) * 128 * nbits // 8
    # two scales for keys with a sketch, one for values, of two bytes each
    assert report.scales_bytes == 3 * 2 * 2 * (32_768 - 132)
    # the rotations do not grow with heads or tokens; real models share them among more heads than two
    growing = report.total_bytes - report.constants_bytes
    assert report.full_bytes / growing >= ratio
    assert report.full_bytes / (growing + report.constants_bytes / 4) >= ratio


def test_report_counts_every_tensor():
    cache = TurboQuantCache(CONFIG, residual_length=16, skip_layers=(1,), condition="none")
    assert cache.memory().compression_ratio == 1 and "empty" in str(cache.memory())
    fill(cache, 300)
    report, layer = cache.memory(), cache.layers[0]
    tensors = [t for buffer in (*layer.codes.values(), layer.exact) for t in buffer.tensors.values()]
    assert report.codes_bytes + report.scales_bytes + report.exact_bytes + report.slack_bytes == sum(
        t.nbytes for t in tensors
    )
    assert report.exact_bytes == 2 * 2 * 2 * 20 * 32 * 4
    assert report.other_bytes == sum(t.nbytes for t in states(300))
    assert report.full_bytes == 2 * report.other_bytes
    assert report.slack_bytes <= (300 / 16 + 256) * 2 * 2 * 2 * 32
    assert f"{report.compression_ratio:.2f} times smaller" in str(report)


def test_a_preset_takes_every_option_of_the_cache():
    cache = TurboQuantCache.from_preset(CONFIG, "small", value_bits=3, max_cache_len=64, offloading=False)
    assert (cache.options.key_bits, cache.options.value_bits) == (2, 3)
    assert cache.options.key_estimator == "qjl" and cache.is_compileable
    with pytest.raises(ValueError, match="`preset` must be one of"):
        TurboQuantCache.from_preset(CONFIG, "fast")


@pytest.mark.skipif(
    "cache" not in inspect.signature(LlamaForCausalLM.forward).parameters,
    reason="before transformers 5.24 the argument is called `past_key_values` alone",
)
@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_new_name_of_the_argument(model):
    """`cache=` in `forward`, `generate` and our own loop: no warning, and what the old name gives."""
    ids = tokens(60)
    found = []
    for options in ({}, {"custom_generate": hf_turboquant.generate}):
        cache = precise_cache()
        out = model.generate(ids, cache=cache, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
        found.append(out.sequences if hasattr(out, "sequences") else out)
        assert cache.get_seq_length() == 65 and cache.layers[0].codes["keys"].length == 65 - 8 - 4
    assert torch.equal(*found)
    cache = precise_cache()
    with torch.no_grad():
        logits = model(ids, cache=cache).logits
    assert cache.get_seq_length() == 60 and torch.equal(logits[:, -1].argmax(-1), found[0][:, 60])
    with pytest.warns(FutureWarning, match="past_key_values"):
        model(ids[:, :1], past_key_values=precise_cache())
