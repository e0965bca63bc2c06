"""Saved caches: the same tokens afterwards, and one clear error for everything that is not as it was written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DynamicCache,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.cache_utils import DynamicLayer

from hf_turboquant import TurboQuantCache, saving
from hf_turboquant._supported import cache_name
from hf_turboquant.hybrid import TurboQuantHybridLayer
from hf_turboquant.layer import TurboQuantLayer

TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIG = LlamaConfig(num_hidden_layers=2, **TINY)
FAMILIES = {
    "llama": (LlamaForCausalLM, CONFIG),
    # sliding windows of 16, one full layer of three
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            num_hidden_layers=3, sliding_window=16, layer_types=["sliding_attention"] * 2 + ["full_attention"], **TINY
        ),
    ),
    "qwen3_next": (
        Qwen3NextForCausalLM,
        Qwen3NextConfig(
            num_hidden_layers=4,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            **TINY,
        ),
    ),
    # both parts in each layer
    "falcon_h1": (
        FalconH1ForCausalLM,
        FalconH1Config(
            num_hidden_layers=2,
            mamba_n_heads=8,
            mamba_d_head=16,
            mamba_n_groups=2,
            mamba_d_state=16,
            mamba_d_ssm=128,
            mamba_chunk_size=16,
            **TINY,
        ),
    ),
}
OPTIONS = {"residual_length": 16, "nbits": 3, "seed": 5}


def make_model(family):
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    return kind(config).eval()


def tokens(length, batch=2):
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(length))


def go_on(model, cache, steps=6):
    """Logits of tokens that follow, one at a time: the codes grow meanwhile."""
    with torch.no_grad():
        return torch.stack([model(ids, **{cache_name(model): cache}).logits for ids in tokens(steps).split(1, dim=1)])


def prefilled(model, length=150, **options):
    cache = TurboQuantCache(model.config, **{**OPTIONS, **options})
    with torch.no_grad():
        model(tokens(length), **{cache_name(model): cache})
    return cache


def filled(*lengths, **options):
    """A cache without a model."""
    cache = TurboQuantCache(CONFIG, **{**OPTIONS, **options})
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        for layer in range(2):
            cache.update(*torch.randn(2, 2, 2, length, 32, generator=generator), layer)
    return cache


def held(cache):
    return [(layer.keys, layer.values) for layer in cache.layers]


def same(cache, other):
    return all(
        torch.equal(a[role] + 0, b[role] + 0) for a, b in zip(held(cache), held(other), strict=True) for role in (0, 1)
    )


@pytest.mark.parametrize("with_config", (True, False))
@pytest.mark.parametrize("capacity", (None, 400))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_cache_goes_on_as_the_saved_one(family, capacity, with_config, tmp_path):
    model = make_model(family)
    cache = prefilled(model, max_cache_len=capacity)
    cache.save_pretrained(tmp_path / "saved")
    loaded = TurboQuantCache.from_pretrained(tmp_path / "saved", config=model.config if with_config else None)
    assert repr(loaded) == repr(cache) and "conditioned" in repr(loaded)
    assert loaded.layer_class_to_replicate is None
    assert loaded.get_seq_length() == 150
    compressed = [layer for layer in loaded.layers if isinstance(layer, TurboQuantLayer)]
    assert compressed and all(layer.tokens.quantized == 150 - 4 - 16 for layer in compressed)
    assert torch.equal(go_on(model, loaded), go_on(model, cache))
    # and not because nothing depends on the past
    assert not torch.equal(go_on(model, loaded), go_on(model, TurboQuantCache(model.config)))


@pytest.mark.parametrize("capacity", (None, 400))
def test_keys_and_values_of_different_dtypes_are_loaded(capacity, tmp_path):
    model = make_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        cache = prefilled(model, max_cache_len=capacity)
    cache.save_pretrained(tmp_path / "saved")
    loaded = TurboQuantCache.from_pretrained(tmp_path / "saved", config=model.config)
    keys, values = held(loaded)[-1]
    assert (keys.dtype, values.dtype) == (torch.float32, torch.bfloat16) and same(loaded, cache)
    assert torch.equal(go_on(model, loaded), go_on(model, cache))


@pytest.mark.parametrize("family, capacity", [*((family, None) for family in FAMILIES), ("llama", 180)])
def test_another_process_writes_the_same_tokens(family, capacity, tmp_path):
    """With a capacity, decode steps are compiled in both."""
    model = make_model(family)
    cache = prefilled(model, max_cache_len=capacity)
    cache.save_pretrained(tmp_path / "saved")
    ids = torch.cat([tokens(150), tokens(7)], dim=1)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **{cache_name(model): cache}, max_new_tokens=12)
    script = f"""
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_saving import cache_name, make_model, tokens, TurboQuantCache
model = make_model({family!r})
cache = TurboQuantCache.from_pretrained({str(tmp_path / "saved")!r}, config=model.config)
ids = torch.cat([tokens(150), tokens(7)], dim=1)
out = model.generate(ids, attention_mask=torch.ones_like(ids), **{{cache_name(model): cache}}, max_new_tokens=12)
print(out.tolist())
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout) == expected.tolist() and expected.shape[1] > 157


@pytest.mark.parametrize(
    ("lengths", "crop"),
    [((7,), 0), ((20,), 0), ((150,), 0), ((100, 60), 0), ((300,), -60), ((150,), -5), ((150,), -100), ((150,), -147)],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"residual_length": 0, "sink_length": 0}, {"condition": "none"}, {"nbits": 2.5}, {"nbits": 8}],
    ids=str,
)
def test_every_length(lengths, crop, options, tmp_path):
    """Empty codes, full and half blocks, a ring that has turned, a ring with a hole after a crop."""
    cache = filled(*lengths, **options)
    cache.crop(crop)
    cache.save_pretrained(tmp_path / "saved")
    loaded = TurboQuantCache.from_pretrained(tmp_path / "saved")
    assert loaded.options == cache.options and same(loaded, cache)
    for each in (loaded, cache):
        generator = torch.Generator().manual_seed(1)
        for count in (1, 40):
            each.update(*torch.randn(2, 2, 2, count, 32, generator=generator), 0)
            each.layers[0].settle()
    assert loaded.layers[0].tokens.quantized == cache.layers[0].tokens.quantized
    assert same(loaded, cache)


@pytest.mark.parametrize("lengths", [(7,), (20,), (150,), (300,)], ids=str)
@pytest.mark.parametrize("options", [{}, {"residual_length": 0, "sink_length": 0}, {"condition": "none"}], ids=str)
def test_every_length_of_static_capacity(lengths, options, tmp_path):
    """What a layer knows before its first code, codes, a crop; and the room that is left."""
    cache = filled(*lengths, max_cache_len=310, **options)
    cache.save_pretrained(tmp_path / "first")
    cache.crop(-5)
    cache.save_pretrained(tmp_path / "saved")
    loaded = TurboQuantCache.from_pretrained(tmp_path / "saved")
    assert loaded.options == cache.options and loaded.get_max_length() == 310
    assert loaded.layers[0].tokens.arena.shape == cache.layers[0].tokens.arena.shape
    assert len({int(each.get_seq_length()) for each in (loaded, cache)}) == 1 and same(loaded, cache)
    # one at a time, as compiled steps do: nobody asks a step for its conditioning
    for each in (loaded, cache):
        for token in torch.randn(2, 2, 2, 15, 32, generator=torch.Generator().manual_seed(1)).split(1, dim=3):
            each.update(*token, 0)
        each.layers[0].measure()
    assert same(loaded, cache) and loaded.layers[0].condition == cache.layers[0].condition
    assert loaded.layers[0].tokens.quantized == cache.layers[0].tokens.quantized
    with pytest.raises(ValueError, match="max_cache_len=310"):
        loaded.update(*torch.randn(2, 2, 2, 300, 32), 0)
    assert TurboQuantCache.from_pretrained(tmp_path / "first").get_seq_length() == sum(lengths)


def test_more_tokens_than_the_capacity_are_refused(tmp_path):
    filled(150, max_cache_len=300).save_pretrained(tmp_path)
    for capacity in (149, 140):
        in_options("max_cache_len", capacity)(tmp_path)
        with pytest.raises(ValueError, match="length must fit the rest of layer 0, got 150"):
            TurboQuantCache.from_pretrained(tmp_path)
    in_options("max_cache_len", 150)(tmp_path)
    assert TurboQuantCache.from_pretrained(tmp_path).get_seq_length() == 150
    # codes need not be more than tokens to be more than there is room for
    in_options("residual_length", 40)(tmp_path)
    with pytest.raises(ValueError, match="length must fit the rest of layer 0, got 150, 130 quantized"):
        TurboQuantCache.from_pretrained(tmp_path)
    in_options("residual_length", 16)(tmp_path)
    in_tokens("quantized", 146)(tmp_path)
    with pytest.raises(ValueError, match="to fit the rest of layer 1"):
        TurboQuantCache.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["TurboQuantStaticLayer", "TurboQuantStaticHybridLayer"])
def test_layers_of_fixed_capacity_under_their_old_names(name, tmp_path, monkeypatch):
    """They were classes of their own."""
    model = make_model("falcon_h1" if "Hybrid" in name else "llama")
    cache, state = prefilled(model, max_cache_len=300), saving._state
    monkeypatch.setattr(saving, "_state", lambda layer, index: {**state(layer, index), "kind": name})
    cache.save_pretrained(tmp_path / "saved")
    assert name in (tmp_path / "saved" / saving.FILE).read_bytes().decode(errors="ignore")
    loaded = TurboQuantCache.from_pretrained(tmp_path / "saved", config=model.config)
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in cache.layers]
    for ours, theirs in zip(cache.layers, loaded.layers, strict=True):
        assert torch.equal(ours.tokens.arena, theirs.tokens.arena)


def test_what_is_loaded_in_inference_mode_can_be_written_to_outside(tmp_path):
    for capacity in (None, 300):
        cache = filled(150, max_cache_len=capacity, skip_layers=(1,))
        cache.save_pretrained(tmp_path / "saved")
        with torch.inference_mode():
            loaded = TurboQuantCache.from_pretrained(tmp_path / "saved")
        for each in (cache, loaded):
            for layer in range(2):
                each.update(*torch.ones(2, 2, 2, 30, 32), layer)
        assert same(loaded, cache)


def test_a_loaded_cache_leaves_later_ones_as_they_were(tmp_path):
    """Empty buffers are made once for all layers that are alike; what is loaded must not get into them."""
    cache = filled(200)
    cache.save_pretrained(tmp_path / "saved")
    loaded = TurboQuantCache.from_pretrained(tmp_path / "saved")
    assert all(layer.tokens.quantizers["keys"].mean is not None for layer in loaded.layers)
    for layer in filled(20).layers:
        layer.settle()
        assert layer.conditioning.waits and layer.tokens.quantizers["keys"].mean is None


def test_queries_seen_before_the_first_code_are_kept(tmp_path):
    model = make_model("llama")
    cache = prefilled(model, length=70, residual_length=128)
    assert cache.layers[0].condition is None and cache.layers[0].conditioning.query_energy is not None
    cache.save_pretrained(tmp_path / "saved")
    loaded = TurboQuantCache.from_pretrained(tmp_path / "saved", config=model.config)
    assert torch.equal(go_on(model, loaded, 80), go_on(model, cache, 80))
    assert loaded.layers[1].condition == "attention"
    assert torch.equal(
        loaded.layers[1].tokens.quantizers["keys"].scale, cache.layers[1].tokens.quantizers["keys"].scale
    )


def test_tokens_that_wait_for_their_query_are_settled_first(tmp_path):
    cache = filled(100)
    assert cache.layers[0].pending is not None
    cache.save_pretrained(tmp_path / "saved")
    assert cache.layers[0].pending is None
    assert same(TurboQuantCache.from_pretrained(tmp_path / "saved"), cache)


def test_hybrid_and_skipped_layers(tmp_path):
    cache = TurboQuantCache(skip_layers=(1,), **OPTIONS)
    cache.layers = [TurboQuantHybridLayer(cache.options, 0, 2), DynamicLayer()]
    for layer in range(2):
        cache.update(*torch.randn(2, 2, 2, 90, 32), layer)
    cache.update_conv_state(torch.randn(2, 8, 4), 0, state_idx=1)
    cache.update_recurrent_state(torch.randn(2, 3, 5), 0, state_idx=1)
    cache.save_pretrained(tmp_path / "saved")
    loaded = TurboQuantCache.from_pretrained(tmp_path / "saved")
    assert same(loaded, cache) and [type(layer) for layer in loaded.layers] == [TurboQuantHybridLayer, DynamicLayer]
    ours, theirs = loaded.layers[0], cache.layers[0]
    assert torch.equal(ours.conv_states[1], theirs.conv_states[1]) and ours.conv_states[0] is None
    assert torch.equal(ours.recurrent_states[1], theirs.recurrent_states[1])
    assert ours.has_previous_state == theirs.has_previous_state == {0: False, 1: True}
    # without a config, layers go on being made as they come
    loaded.update(*torch.randn(2, 2, 2, 3, 32), 2)
    assert len(loaded) == 3 and isinstance(loaded.layers[2], TurboQuantLayer)


def test_an_empty_cache(tmp_path):
    for cache in (TurboQuantCache(CONFIG), TurboQuantCache()):
        cache.save_pretrained(tmp_path / "saved")
        loaded = TurboQuantCache.from_pretrained(tmp_path / "saved")
        assert len(loaded) == len(cache) and loaded.get_seq_length() == 0


def test_the_file_holds_the_used_tokens_and_no_rotation(tmp_path):
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=128)
    cache, full = TurboQuantCache(config), DynamicCache(config=config)
    states = torch.randn(2, 1, 2, 4096, 128, dtype=torch.float16)
    for each in (cache, full):
        each.update(*states, 0)
    for token in states.split(1, dim=3)[:200]:
        cache.update(*token, 0)
        full.update(*token, 0)
    cache.save_pretrained(tmp_path / "saved")
    written = sum(path.stat().st_size for path in (tmp_path / "saved").iterdir())
    assert full.layers[0].keys.nbytes * 2 > 3.3 * written
    report = cache.memory()
    assert report.slack_bytes > 0 and report.constants_bytes > 0
    # the last block is whole, the json and a mean come on top
    used = report.codes_bytes + report.scales_bytes + report.exact_bytes
    assert used < written < used + 128 * 2 * 2 * 128 + 8000


def test_a_saved_cache_is_replaced_and_nothing_else_is(tmp_path, monkeypatch):
    folder = tmp_path / "saved"
    filled(50).save_pretrained(folder)
    cache = filled(80)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_file", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            cache.save_pretrained(folder)
        with pytest.raises(OSError, match="disk full"):
            cache.save_pretrained(tmp_path / "another")
    assert TurboQuantCache.from_pretrained(folder).get_seq_length() == 50
    cache.save_pretrained(folder)
    assert TurboQuantCache.from_pretrained(folder).get_seq_length() == 80
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    # whoever may read the folder may read the file
    folder.chmod(0o750)
    cache.save_pretrained(folder)
    assert (folder / saving.FILE).stat().st_mode & 0o777 == 0o640
    (tmp_path / "empty").mkdir()
    cache.save_pretrained(tmp_path / "empty")
    assert TurboQuantCache.from_pretrained(tmp_path / "empty").get_seq_length() == 80


@pytest.mark.parametrize("name", ("notes.txt", "cache.json", "cache.safetensors"))
def test_what_is_not_ours_is_not_replaced(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="must be"):
        filled(50).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "{}"


def test_a_layer_that_cannot_be_saved_is_named(tmp_path):
    class OddLayer(DynamicLayer):
        pass

    cache = filled(50)
    cache.layers[1] = OddLayer()
    with pytest.raises(ValueError, match="got OddLayer at layer 1"):
        cache.save_pretrained(tmp_path / "saved")
    cache.layers[1] = DynamicLayer()
    cache.layers[1].odd = object()
    with pytest.raises(ValueError, match=r"`layers\[1\]\['fields'\]\['odd'\]` must be a tensor or a plain value"):
        cache.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def rewritten(folder, change, in_tensors=lambda tensors: None, sign=True):
    """The cache after `change`, with a checksum that fits: only what it says can give it away."""
    header, tensors = saving._read_header(folder), load_file(folder / saving.FILE)
    digest = header.pop("sha256")
    change(header)
    in_tensors(tensors)
    header["sha256"] = saving._sha256(header, tensors) if sign else digest
    save_file(tensors, folder / saving.FILE, {"cache": json.dumps(header)})


def cut(folder):
    path = folder / saving.FILE
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder):
    path = folder / saving.FILE
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")


def edit(folder):
    path = folder / saving.FILE
    text = path.read_bytes()
    assert b'\\"length\\": 150' in text
    path.write_bytes(text.replace(b'\\"length\\": 150', b'\\"length\\": 149'))


def in_tokens(name, value):
    return lambda folder: rewritten(folder, lambda header: header["layers"][1]["tokens"].update({name: value}))


def in_header(name, value):
    return lambda folder: rewritten(folder, lambda header: header.update({name: value}))


def in_options(name, value):
    return lambda folder: rewritten(folder, lambda header: header["options"].update({name: value}))


def in_tensor(name, change):
    return lambda folder: rewritten(folder, lambda header: None, lambda x: x.update({name: change(x[name])}))


def unsigned(in_tensors):
    return lambda folder: rewritten(folder, lambda header: None, in_tensors, sign=False)


def described_by(text):
    return lambda folder: save_file({}, folder / saving.FILE, text and {"cache": text})


def pickled(folder):
    torch.save({"a": torch.zeros(1)}, folder / saving.FILE)


TOKENS = "layers[1]['tokens']"
SCALES = f"{TOKENS}['stored']['keys']['scales']"
EXACT = f"{TOKENS}['stored']['values']['exact'][1]"
MEAN = f"{TOKENS}['mean']"
CORRUPTIONS = {
    "constants missing": (in_tokens("constants", {"keys": [], "values": []}), "'constants'.* must be .*, got nothing"),
    "cut off": (cut, "SafetensorError"),
    "a bit flipped": (flip, "must be as it was written"),
    "json edited": (edit, "must be as it was written"),
    "json cut off": (described_by('{"format'), "Unterminated string"),
    "json a list": (described_by("[]"), "AttributeError: 'list'"),
    # up to format 4 the description was a file of its own
    "no json": (described_by(None), "must say 'hf_turboquant cache', as from format 5 on, got None"),
    "no file": (lambda f: (f / saving.FILE).unlink(), "No such file"),
    "foreign json": (in_header("format", "safetensors index"), "must say 'hf_turboquant cache', .*, got 'safe"),
    "pickle": (pickled, "SafetensorError"),
    "newer format": (in_header("format_version", 6), "must be 5, got 6, as hf_turboquant .* wrote"),
    "older format": (in_header("format_version", 4), "must be 5, got 4, as hf_turboquant .* prefill the text again"),
    "format of no kind": (in_header("format_version", "one"), "its format must be 5, got one"),
    "unknown option": (in_options("bits_of_mind", 3), "bits_of_mind"),
    "option out of range": (in_options("nbits", 99), "`nbits` must be 2, .* or 8, got 99"),
    "other widths": (in_options("key_bits", 4), "'keys'.* must be torch.uint8 .* to fit"),
    "other seed": (in_options("seed", 6), "'constants'.*'keys'.* to fit the rest of layer 0"),
    "other rotation": (in_options("rotation", "haar"), "'constants'.*'keys'.* to fit the rest of layer 0"),
    "length": (in_tokens("length", 149), "'stored'.*'exact'.* to fit the rest of layer 1"),
    "negative length": (in_tokens("length", -150), "length must fit"),
    "codes": (in_tokens("quantized", 129), "'stored'.*'exact'.* to fit the rest of layer 1"),
    "length and codes": (in_tokens("quantized", 1300), "length must fit"),
    "length no number": (in_tokens("length", "150"), "TypeError: .*'str' and 'int'"),
    "condition": (in_tokens("learned", [True, False, True, 146]), r"\['scale'\] must be None to fit"),
    "unknown condition": (in_tokens("learned", "magic"), "TypeError: Learned"),
    "no mean": (in_tokens("mean", None), r"\['mean'\] must be torch.float32 .*, got None"),
    "unknown tokens": (in_tokens("channels", None), r"\['channels'\] must be nothing to fit"),
    "scales of another dtype": (in_tensor(SCALES, lambda t: t.float()), "'scales'. must be torch.bfloat16"),
    "scales of fewer blocks": (in_tensor(SCALES, lambda t: t[:, :, 1:].contiguous()), "'scales'. must be .* to fit"),
    "exact tokens gone": (in_tensor(EXACT, lambda t: t[:, :, 1:].contiguous()), "'values'.*'exact'.* to fit"),
    "exact values that are integers": (in_tensor(EXACT, lambda t: t.int()), "must be torch.float32 .* to fit"),
    "mean of other heads": (in_tensor(MEAN, lambda t: t[:1].contiguous()), r"\['mean'\] must be torch.float32 \[2, "),
    "queries of another shape": (in_tokens("query_energy", f"$tensor {MEAN}"), "'query_energy'. must be .* .2, 32. to"),
    "padding of another shape": (in_tokens("valid", f"$tensor {MEAN}"), "'valid'. must be torch.bool .2, 150. to fit"),
    "tensor renamed": (unsigned(lambda x: x.update(odd=x.pop(SCALES))), "must be as it was written"),
    "tensor of another dtype": (unsigned(lambda x: x.update({MEAN: x[MEAN].view(torch.int32)})), "as it was written"),
    "tensor missing": (
        lambda folder: rewritten(folder, lambda header: None, lambda x: x.pop(SCALES)),
        'KeyError: "layers.*scales',
    ),
    "unknown layer": (
        lambda f: rewritten(f, lambda header: header["layers"][0].update(kind="OddLayer")),
        "OddLayer",
    ),
    "unknown field": (
        lambda f: rewritten(f, lambda header: header["layers"][0]["fields"].update(odd=1)),
        "must have a field `odd`",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving") / "saved"
    prefilled(make_model("llama")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corruption(corruption, saved, tmp_path):
    corrupt, message = CORRUPTIONS[corruption]
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    TurboQuantCache.from_pretrained(tmp_path)
    corrupt(tmp_path)
    with pytest.raises(ValueError, match=message):
        TurboQuantCache.from_pretrained(tmp_path)


def test_a_cache_of_an_older_format_is_replaced(saved, tmp_path):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    in_header("format_version", 2)(tmp_path)
    cache = filled(150)
    cache.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [saving.FILE]
    assert same(TurboQuantCache.from_pretrained(tmp_path), cache)


@pytest.mark.parametrize(
    "folder, what",
    [("nothing there", "No such file"), ("a model", "No such file"), ("a model/config.json", "No such file")],
)
def test_folders_that_hold_no_cache(folder, what, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "a model")
    with pytest.raises(ValueError, match=f"{folder} must be a saved cache: {what}.*Name another"):
        TurboQuantCache.from_pretrained(tmp_path / folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(num_hidden_layers=3, **TINY), "its num_hidden_layers is 2, got 3"),
        (LlamaConfig(num_hidden_layers=2, **{**TINY, "head_dim": 16}), "its head_dim is 32, got 16"),
        (LlamaConfig(num_hidden_layers=2, **{**TINY, "num_key_value_heads": 4}), "its num_key_value_heads is 2, got 4"),
        (FAMILIES["gemma3"][1], "its model_type is llama, got gemma3_text"),
    ],
)
def test_another_model(config, message, saved):
    with pytest.raises(ValueError, match=message):
        TurboQuantCache.from_pretrained(saved, config=config)
    with pytest.raises(ValueError, match="`config` must be the model's config, got str"):
        TurboQuantCache.from_pretrained(saved, config="llama")
    assert TurboQuantCache.from_pretrained(saved, config=CONFIG).get_seq_length() == 150


@pytest.mark.parametrize("family", ("gemma3", "qwen3_next"))
def test_layers_of_another_kind(family, tmp_path):
    """A cache that was never told its model: the layers tell."""
    kind, config = FAMILIES[family]
    cache = TurboQuantCache(**OPTIONS)
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, 2, 2, 9, 32), layer)
    cache.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="its layer 0 is .'TurboQuantLayer'"):
        TurboQuantCache.from_pretrained(tmp_path / "saved", config=config)
    with pytest.raises(ValueError, match="its number of layers is"):
        TurboQuantCache.from_pretrained(tmp_path / "saved", config=CONFIG)


def test_steps_after_padding_can_be_saved(tmp_path):
    model = make_model("llama")
    cache = TurboQuantCache(model.config, max_cache_len=256)
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, :7] = 0
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, cache_name(model): cache}
    model.generate(tokens(50), attention_mask=mask, **options)
    assert cache.layers[0].conditioning.valid is not None
    cache.save_pretrained(tmp_path / "saved")
    loaded = TurboQuantCache.from_pretrained(tmp_path / "saved", config=model.config)
    assert loaded.layers[0].conditioning.valid.shape == (2, 53) and same(loaded, cache)
