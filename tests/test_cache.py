"""The drop-in: the same calls on `DynamicCache` and on ours."""

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch
from test_models import ROWS
from torch.utils._pytree import tree_map
from transformers import (
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    Qwen3NextConfig,
)
from transformers.cache_utils import DynamicLayer, StaticLayer

import hf_turboquant
from hf_turboquant import QuantizedStates, TurboQuantCache
from hf_turboquant._supported import cache_name
from hf_turboquant.cache import _log_unpackable
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
# 8 bits, everything quantized: close to exact, and nothing is close by accident
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
        c.reset(),
        c.early_initialization(2, 2, 32, torch.float32, "cpu"),
        fill(c, 9, 1),
    )[1],
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
                out = model(ids[:, start:stop], attention_mask=mask[:, :stop], **{cache_name(model): cache}).logits
            start = stop
        logits.append(out)
    assert cache.layers[0].tokens.quantized == 50
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
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **{cache_name(model): cache}, **options
            )
        )
    assert cache.layers[0].tokens.quantized > 20
    assert torch.equal(*outputs)


@pytest.mark.parametrize("first", (torch.inference_mode, torch.no_grad, torch.enable_grad))
@pytest.mark.parametrize("then", (torch.inference_mode, torch.no_grad, torch.enable_grad))
def test_modes_may_change_between_calls(model, first, then):
    ids, logits = tokens(60), []
    for cache in (DynamicCache(config=CONFIG), precise_cache()):
        with first():
            model(ids[:, :40], **{cache_name(model): cache})
            model(ids[:, 40:41], **{cache_name(model): cache})
            cache.reorder_cache(torch.tensor([1, 0]))
        with then():
            model(ids[:, 41:42], **{cache_name(model): cache})
            logits.append(model(ids[:, 42:60], **{cache_name(model): cache}).logits.detach())
    assert (logits[1] - logits[0]).norm() < 0.02 * logits[0].norm()
    for buffer in (*cache.layers[0].tokens.codes.values(), cache.layers[0].tokens.exact):
        assert not any(tensor.requires_grad or tensor.is_inference() for tensor in buffer.tensors.values())


def test_left_padding_in_generate(model):
    ids, mask = tokens(40), torch.ones(2, 40, dtype=torch.long)
    ids[0, :13], mask[0, :13] = 0, 0
    outputs = [
        model.generate(ids, attention_mask=mask, max_new_tokens=12, **{cache_name(model): cache})
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
                **{cache_name(model): cache},
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


def odd_states(length, head_dim, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 2, length, head_dim, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("room", (None, 60))
@pytest.mark.parametrize("early", (False, True))
def test_head_dims_that_cannot_be_packed_stay_in_full_precision(room, early, caplog, tmp_path):
    """A model whose layers differ: 8 is too small, 18 no multiple of 4, 100 has no kernels but codes."""
    dims, kind = (8, 100, 18, 32), DynamicLayer if room is None else StaticLayer
    config = LlamaConfig(num_hidden_layers=4, hidden_size=64, num_attention_heads=2, vocab_size=99)
    cache, full = TurboQuantCache(config, **STREAMING, max_cache_len=room), DynamicCache(config=config)
    _log_unpackable.cache_clear()
    if early:
        cache.early_initialization(2, 2, list(dims), torch.float32, "cpu")
    for length in (30, 1, 1):
        for index, dim in enumerate(dims):
            ours, theirs = (c.update(*odd_states(length, dim, seed=index), index) for c in (cache, full))
            for x, y in zip(ours, theirs, strict=True):
                error = (plain(x)[:, :, : y.shape[2]] - y).norm() / y.norm()
                assert error < 0.015 if index in (1, 3) else error == 0
    assert [type(layer) for layer in cache.layers[::2]] == [kind, kind]
    assert cache.layers[1].tokens.quantized == cache.layers[3].tokens.quantized > 0
    assert [int(cache.get_seq_length(index)) for index in range(4)] == [32] * 4
    assert "2 of 4 layers compressed: 1, 3" in repr(cache)
    assert "head_dim 8 cannot be packed: 0" in repr(cache) and "head_dim 18 cannot be packed: 2" in repr(cache)
    assert caplog.text.count("Layers of head_dim 8 stay in full precision") == 1
    cache.save_pretrained(tmp_path / "saved")
    assert repr(TurboQuantCache.from_pretrained(tmp_path / "saved", config)) == repr(cache)
    cache.reset()
    assert "2 of 4 layers compressed" in repr(cache)


def test_without_a_config_any_layer_may_stay_in_full_precision():
    cache = TurboQuantCache(**STREAMING)
    for index, dim in enumerate((18, 32)):
        cache.update(*odd_states(20, dim), index)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, TurboQuantLayer]


def test_recurrent_states_outlive_the_codes_of_their_layer():
    row = next(row for row in ROWS if row.name == "falcon_h1")
    row = dataclasses.replace(row, options={**row.options, "head_dim": 8}, model_type="falcon_h1")
    model = row.model()
    cache, full = TurboQuantCache(model.config), row.full_cache(model.config)
    # one that can be packed, so that the others may stay as they are
    cache.layers.append(TurboQuantLayer(cache.options, 3))
    assert torch.equal(*(row.prefill_and_decode(model, each) for each in (full, cache)))
    assert type(cache.layers[0]) is type(full.layers[0])


def test_a_model_without_any_layer_to_compress_is_refused():
    config = LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=99)
    model, cache = LlamaForCausalLM(config).eval(), TurboQuantCache(config)
    assert "0 of 2 layers compressed" in repr(cache) and "head_dim 8 cannot be packed: 0-1" in repr(cache)
    # the config does not always tell
    unaware = TurboQuantCache(CONFIG)
    for each in (cache, cache, unaware, unaware):
        with pytest.raises(ValueError, match="multiple of 4, 16 at least, got head_dim 8 in layer 0.*`DynamicCache`"):
            model(tokens(5), **{cache_name(model): each})


def test_layers_of_different_configs():
    """A config whose layers differ refuses to tell one head_dim for all."""
    config = LlamaConfig(
        num_hidden_layers=3, hidden_size=64, num_attention_heads=2, per_layer_config={1: {"head_dim": 8}}
    )
    cache = TurboQuantCache(config)
    assert "2 of 3 layers compressed: 0, 2" in repr(cache) and "head_dim 8 cannot be packed: 1" in repr(cache)
    assert len(cache.layers[0].frequencies) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": CONFIG, "skip_layers": (2,)}, "`skip_layers` must be from -2 to 1 for this model"),
        ({"skip_layers": (-1,)}, "Negative `skip_layers` need the model's `config`"),
        ({"config": "llama"}, "`config` must be the model's config, got str. Use `model.config`"),
        ({"config": LlamaForCausalLM}, "got the class LlamaForCausalLM. Use `model.config`"),
        ({"config": LlamaForCausalLM(CONFIG)}, "got LlamaForCausalLM. Use `model.config`"),
        ({"nbit": 3}, "got `nbit`. Did you mean `nbits`?"),
        ({"offload": True}, "got `offload`. Did you mean `offloading`?"),
        ({"colour": 3}, "got `colour`. Take one of config, nbits, .*, offload_only_non_sliding."),
        ({"config": CONFIG, "nbits": 9}, "`nbits` must be 2, 2.5, 3, 3.5, 4 or 8, got 9"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TurboQuantCache(**arguments)


@pytest.mark.parametrize("options", ({}, {"custom_generate": hf_turboquant.generate}))
def test_the_class_in_place_of_an_object(model, options):
    with pytest.raises(ValueError, match=r"got the class. Pass `TurboQuantCache\(model.config\)`"):
        model.generate(tokens(5), **{cache_name(model): TurboQuantCache}, max_new_tokens=2, **options)
    # and no cache that is made later takes itself for the user's
    assert not hasattr(TurboQuantCache(CONFIG), "_is_user_defined")


@pytest.mark.parametrize("options", ({}, {"max_cache_len": 64}))
@pytest.mark.parametrize("loop", ({}, {"custom_generate": hf_turboquant.generate}))
def test_a_cache_of_another_prompt(model, options, loop):
    cache = TurboQuantCache(CONFIG, **options)
    loop = {cache_name(model): cache, "max_new_tokens": 3, "min_new_tokens": 3, **loop}
    model.generate(tokens(20, batch=1), **loop)
    with pytest.raises(ValueError, match=r"go on from the 22 tokens that the cache holds.* or `reset\(\)` the cache"):
        model.generate(tokens(10, batch=1), **loop)
    assert cache.get_seq_length() == 22


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
    tensors = [t for buffer in (*layer.tokens.codes.values(), layer.tokens.exact) for t in buffer.tensors.values()]
    assert report.codes_bytes + report.scales_bytes + report.exact_bytes + report.slack_bytes == sum(
        t.nbytes for t in tensors
    )
    assert report.exact_bytes == 2 * 2 * 2 * 20 * 32 * 4
    assert report.other_bytes == sum(t.nbytes for t in states(300))
    assert report.full_bytes == 2 * report.other_bytes
    assert report.slack_bytes <= (300 / 16 + 256) * 2 * 2 * 2 * 32
    assert f"{report.compression_ratio:.2f} times smaller" in str(report)


@pytest.mark.parametrize(
    "options", ({}, {"nbits": 2}, {"residual_length": 32, "key_estimator": "rescaled"}, {"max_cache_len": 2000})
)
def test_short_texts_say_from_where_on_the_cache_is_smaller(options):
    def report(length):
        cache = TurboQuantCache(CONFIG, **options)
        for layer in range(2):
            cache.update(*states(length, layer), layer)
            cache.layers[layer].settle(torch.randn(2, 4, length, 32))
        return cache.memory()

    short = report(20)
    count = short.smaller_from
    assert f"{1 / short.compression_ratio:.1f} times larger; smaller from about {count:,} tokens on" in str(short)
    assert report(int(0.9 * count)).compression_ratio < 1 < report(int(1.05 * count)).compression_ratio
    # a capacity that is all exact never is
    never = TurboQuantCache(CONFIG, max_cache_len=40)
    never.update(*states(20), 0)
    assert "times larger (" in str(never.memory())
    never.reset()
    never.early_initialization(2, 2, 32, torch.float32, "cpu")
    assert "in place of 0 B: no tokens (" in str(never.memory())


def test_a_preset_takes_every_option_of_the_cache():
    cache = TurboQuantCache.from_preset(CONFIG, "small", value_bits=3, max_cache_len=64, offloading=False)
    assert (cache.options.key_bits, cache.options.value_bits) == (2, 3)
    assert cache.options.key_estimator == "qjl" and cache.is_compileable
    with pytest.raises(ValueError, match="`preset` must be one of"):
        TurboQuantCache.from_preset(CONFIG, "fast")
    with pytest.raises(ValueError, match=r"got 'small'. Use `TurboQuantCache.from_preset\(model.config, 'small'\)`"):
        TurboQuantCache.from_preset("small", CONFIG)


@pytest.mark.parametrize("kind", (DynamicCache, TurboQuantCache))
def test_purely_recurrent_models_are_not_compiled(kind):
    """Their layers allow it; `generate` leaves only the class `DynamicCache` alone."""
    config = Mamba2Config(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8, expand=2,
        n_groups=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model, cache, everywhere = Mamba2ForCausalLM(config).eval(), kind(config=config), CompileConfig()
    everywhere._compile_all_devices = True
    options = {"max_new_tokens": 3, "do_sample": False, "compile_config": everywhere}
    model.generate(tokens(12), **{cache_name(model): cache}, **options)
    assert cache.has_previous_state() and not hasattr(model, "_compiled_call")
    assert TurboQuantCache(config, max_cache_len=20).is_compileable


class CacheOfAUser(TurboQuantCache):
    pass


@pytest.mark.parametrize("kind", (TurboQuantCache, CacheOfAUser))
def test_a_cache_is_one_leaf_less_tree_and_is_not_exported(model, kind):
    exporters = pytest.importorskip("transformers.exporters.exporter_dynamo")
    exporters.register_cache_pytrees_for_model(model)
    cache = kind(CONFIG)
    with torch.no_grad():
        model(tokens(30), **{cache_name(model): cache})
    assert tree_map(lambda leaf: 1 / 0, {"cache": [cache]}) == {"cache": [cache]}
    inputs = {"input_ids": tokens(1), cache_name(model): cache, "use_cache": True}
    for export in (
        lambda: torch.export.export(model, (), inputs),
        lambda: torch.export.export(model, (), inputs, strict=True),
        lambda: exporters.DynamoExporter().export(model, inputs, exporters.DynamoConfig()),
    ):
        with pytest.raises(ValueError, match="a `DynamicCache`"):
            export()
    assert cache.get_seq_length() == 30 and cache.options == TurboQuantCache().options


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
        assert cache.get_seq_length() == 65 and cache.layers[0].tokens.quantized == 65 - 8 - 4
    assert torch.equal(*found)
    cache = precise_cache()
    with torch.no_grad():
        logits = model(ids, cache=cache).logits
    assert cache.get_seq_length() == 60 and torch.equal(logits[:, -1].argmax(-1), found[0][:, 60])
    with pytest.warns(FutureWarning, match="past_key_values"):
        model(ids[:, :1], past_key_values=precise_cache())
