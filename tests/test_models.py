"""Every family of models against `DynamicCache`: a family is a row."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    DynamicCache,
    EncoderDecoderCache,
)
from transformers.cache_utils import DynamicLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_turboquant import QuantizedStates, TurboQuantCache
from hf_turboquant._supported import cache_name
from hf_turboquant.layer import TurboQuantLayer
from hf_turboquant.states import LayerStates

pytestmark = pytest.mark.usefixtures("early_learning")
BATCH, PROMPT, PADDING, STEPS, VOCAB = 2, 40, 7, 6, 97
# tokens that stand for an image, behind those of text
IMAGE, VIDEO, VISION_START, VISION_END = 93, 94, 95, 96
TABLE = "| tiny model | layers compressed | worst relative error of a token's logits, 8 bits |"
LEFT_OUT = object()
GREEDY = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}

# eight bits and no exact window: every token that attention reads comes from the codes
ALL_CODES = {"nbits": 8, "key_estimator": "rescaled", "residual_length": 0, "sink_length": 0}
# relative error of a vector in eight bits: the square root of Panter and Dite's 2.72 / 4**8
EIGHT_BITS = 0.0065
# the defaults, but for a window so small that the prompt leaves it
SMALL_WINDOW = {"residual_length": 8, "sink_length": 2}
# the same logits from other kernels in float32
ROUNDING = 1e-5

# weights this large make attention peaked: with the usual 0.02 it is uniform and forgives any error in the keys
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.125,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# every token takes every expert: a router near a tie would turn an error of any size into another expert
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 48}
LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
    "mamba_d_ssm": 128,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "rope_parameters": ROPE,
}
WHISPER = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "num_mel_bins": 8,
    "max_source_positions": 32,
    "max_target_positions": 64,
    "init_std": 0.125,
    "decoder_start_token_id": 1,
    "hidden_size": LEFT_OUT,
    "num_hidden_layers": LEFT_OUT,
}
T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    # the caches of transformers count the layers of its encoder
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 1,
    "hidden_size": LEFT_OUT,
    "num_hidden_layers": LEFT_OUT,
    "num_attention_heads": LEFT_OUT,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
CHUNKED = ["chunked_attention", "full_attention"] * 2
INDEX = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 16}
MPT = {"d_model": 64, "n_heads": 4, "n_layers": 3, "hidden_size": LEFT_OUT, "num_hidden_layers": LEFT_OUT}
HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]


@dataclass(frozen=True, eq=False)
class Row:
    """
    A tiny model of one family.

    Args:
        compressed (`int`): so many of its layers hold full attention.
        options (`dict`): what its config needs beside or in place of `SIZES`.
        attentions (`tuple[str, ...]`): what `attn_implementation` may be; all of them compute the same.
        dequantizes (`tuple[str, ...]`): those of them that can't attend straight from the codes; where it is not just
            eager, the reason stands beside the row.
    """

    name: str
    compressed: int
    options: dict = field(default_factory=dict)
    model_type: str | None = None
    attentions: tuple[str, ...] = ("sdpa", "eager", "turboquant")
    dequantizes: tuple[str, ...] = ("eager",)

    model_class = AutoModelForCausalLM

    def config(self):
        model_type = self.model_type or self.name
        if model_type not in CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
        options = {name: value for name, value in {**SIZES, **self.options}.items() if value is not LEFT_OUT}
        return AutoConfig.for_model(model_type, **copy.deepcopy(options))

    def model(self, attention: str | None = None):
        torch.manual_seed(0)
        options = {"attn_implementation": attention} if attention else {}
        return self.model_class.from_config(self.config(), **options).eval()

    def cache(self, config, **options):
        return TurboQuantCache(config, **options)

    def full_cache(self, config):
        return DynamicCache(config=config)

    def inputs(self) -> dict[str, torch.Tensor]:
        """A prompt and the tokens after it; the second row is padded on the left."""
        input_ids = torch.randint(3, IMAGE, (BATCH, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
        attention_mask = torch.ones_like(input_ids)
        input_ids[1, :PADDING] = attention_mask[1, :PADDING] = 0
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def prefill_inputs(self, config) -> dict[str, torch.Tensor]:
        """What the prompt brings beside its tokens."""
        return {}

    def prefill_and_decode(self, model, cache, after_prefill=lambda cache: None) -> torch.Tensor:
        """Logits of all positions: the prompt at once, then token by token."""
        inputs, options = self.inputs(), {cache_name(model): cache, "use_cache": True}
        outputs, start = [], 0
        with torch.no_grad():
            for stop in range(PROMPT, PROMPT + STEPS + 1):
                tokens, mask = inputs["input_ids"][:, start:stop], inputs["attention_mask"][:, :stop]
                extra = {} if start else self.prefill_inputs(model.config)
                outputs.append(self.forward(model, tokens, mask, **extra, **options).logits)
                if start == 0:
                    after_prefill(cache)
                start = stop
        return torch.cat(outputs, dim=1)

    def forward(self, model, tokens, mask, **options):
        return model(input_ids=tokens, attention_mask=mask, **options)

    def generate(self, model, cache) -> torch.Tensor:
        """The tokens generated."""
        inputs = {name: tensor[:, :PROMPT] for name, tensor in self.inputs().items()}
        inputs.update(self.prefill_inputs(model.config), **{cache_name(model): cache})
        return model.generate(**inputs, **GREEDY)[:, PROMPT:]


class VisionRow(Row):
    """A model with a vision tower: its text config is nested, and the prompt shows an image in each row."""

    model_class = AutoModelForImageTextToText
    # patches of an image: time, height, width; two by two of them make a token
    grid = (1, 4, 4)
    image = slice(10, 14)

    def config(self):
        tokens = {
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END,
        }
        vision = {
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": SIZES["hidden_size"],
            "fullatt_block_indexes": [0],
            "num_position_embeddings": 16,
        }
        text = copy.deepcopy({**SIZES, **self.options})
        return AutoConfig.for_model(self.name, text_config=text, vision_config=vision, **tokens)

    def inputs(self):
        inputs = super().inputs()
        inputs["input_ids"][:, self.image] = IMAGE
        return inputs

    def prefill_inputs(self, config):
        vision = config.vision_config
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = torch.randn(BATCH * 4 * 4, size, generator=torch.Generator().manual_seed(3))
        kinds = torch.zeros(BATCH, PROMPT, dtype=torch.long)
        kinds[:, self.image] = 1
        grid = torch.tensor([self.grid] * BATCH)
        return {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}

    def forward(self, model, tokens, mask, **options):
        if tokens.shape[1] < mask.shape[1]:
            # as `generate` does: the model alone takes the mask's positions for those of the tokens
            positions = (mask.cumsum(-1) - 1)[:, -tokens.shape[1] :] + model.model.rope_deltas
            options["position_ids"] = positions.expand(3, -1, -1)
        return super().forward(model, tokens, mask, **options)


@dataclass(frozen=True, eq=False)
class EncoderDecoderRow(Row):
    """
    A model with cross-attention, whose cache is a pair.

    Args:
        cross (`bool`): whether the keys and values of the source are compressed too.
    """

    cross: bool = True
    source_length = 32

    def cache(self, config, **options):
        cross = TurboQuantCache(config, **options) if self.cross else DynamicCache(config=config)
        return EncoderDecoderCache(TurboQuantCache(config, **options), cross)

    def full_cache(self, config):
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))

    def source(self, config) -> dict[str, torch.Tensor]:
        tokens = torch.randint(3, IMAGE, (BATCH, self.source_length), generator=torch.Generator().manual_seed(3))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def forward(self, model, tokens, mask, **options):
        source = self.source(model.config)
        return model(decoder_input_ids=tokens, decoder_attention_mask=mask, **source, **options)

    def generate(self, model, cache):
        inputs = {f"decoder_{name}": tensor[:, :PROMPT] for name, tensor in self.inputs().items()}
        tokens = model.generate(**self.source(model.config), **inputs, **{cache_name(model): cache}, **GREEDY)
        # whisper leaves the prompt out
        return tokens[:, -STEPS:]


class TextRow(EncoderDecoderRow):
    model_class = AutoModelForSeq2SeqLM


class SpeechRow(EncoderDecoderRow):
    model_class = AutoModelForSpeechSeq2Seq

    def source(self, config):
        shape = (BATCH, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": torch.randn(shape, generator=torch.Generator().manual_seed(3))}


def typed(layer_types, **options):
    return {"layer_types": layer_types, "num_hidden_layers": len(layer_types), **options}


ROWS = [
    Row("llama_gqa", 3, model_type="llama"),
    Row("llama_mqa", 3, {"num_key_value_heads": 1}, model_type="llama"),
    Row("llama_mha", 3, {"num_key_value_heads": 4}, model_type="llama"),
    Row("mistral", 3, {"sliding_window": None}),
    Row("mistral_sliding", 0, {"sliding_window": 16}, model_type="mistral"),
    Row("qwen2", 3),
    Row("qwen3", 3),
    Row("qwen3_moe", 3, MOE),
    # transformers 5.17 takes sdpa by default, which leaves the softcap out
    Row(
        "gemma2",
        2,
        typed(SLIDING, sliding_window=16, query_pre_attn_scalar=16, attn_logit_softcapping=5.0),
        attentions=("eager", "turboquant"),
    ),
    Row("gemma3", 2, typed(SLIDING, sliding_window=16, query_pre_attn_scalar=16), model_type="gemma3_text"),
    Row("gpt_oss", 2, typed(SLIDING, sliding_window=16, **MOE), attentions=("eager", "turboquant")),
    Row("phi3", 3),
    # its attention is written out and knows no other names
    Row("falcon", 3, {"head_dim": LEFT_OUT}, attentions=("sdpa", "eager")),
    # and its eager adds ALiBi twice
    Row("falcon_alibi", 3, {"head_dim": LEFT_OUT, "alibi": True}, model_type="falcon", attentions=("sdpa",)),
    # written out too, but takes any name, so its mask has to be one to add
    Row("mpt", 3, MPT, attentions=("eager", "turboquant"), dequantizes=("eager", "turboquant")),
    Row("llama4", 2, typed(CHUNKED, attention_chunk_size=16, **MOE), model_type="llama4_text"),
    # sparse attention: its layers hold an index beside keys and values
    Row("deepseek_v32", 0, {**MLA, **MOE, **INDEX}, attentions=("sdpa", "eager")),
    Row("gpt2", 3, {"n_embd": 64, "n_head": 4, "n_layer": 3}),
    Row("gpt_neox", 3),
    # MLA caches latents, which a projection expands before anything attends
    Row("deepseek_v3", 3, {**MLA, **MOE}, dequantizes=("sdpa", "eager", "turboquant")),
    Row("qwen3_next", 2, typed(HYBRID, **LINEAR, **MOE, shared_expert_intermediate_size=48)),
    Row("qwen3_5_text", 2, typed(HYBRID, **LINEAR)),
    Row("qwen3_5_moe_text", 2, typed(HYBRID, **LINEAR, **MOE)),
    Row(
        "gemma4",
        2,
        typed(
            SLIDING[:3] + ["full_attention", "sliding_attention", "full_attention"],
            sliding_window=16,
            global_head_dim=32,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=VOCAB,
        ),
        model_type="gemma4_text",
    ),
    Row("jamba", 2, {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, **MOE}),
    Row("bamba", 2, {"num_hidden_layers": 4, "attn_layer_indices": [1, 3], **MAMBA2}),
    Row("falcon_h1", 3, MAMBA2),
    Row("granitemoehybrid", 2, typed(["mamba", "attention"] * 2, **MAMBA2, **MOE)),
    Row(
        "nemotron_h",
        2,
        {
            "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe", "full_attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 16,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 48,
            **MOE,
        },
    ),
    Row(
        "zamba2",
        2,
        {
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "num_hidden_layers": 4,
            "n_mamba_heads": 8,
            "mamba_d_state": 16,
            "mamba_ngroups": 2,
            "chunk_size": 16,
            "num_key_value_heads": 4,
            "use_mem_rope": True,
            "adapter_rank": 8,
            "head_dim": LEFT_OUT,
        },
    ),
    Row("lfm2", 2, typed(["conv", "full_attention"] * 2)),
    # MLA again
    Row(
        "kimi_linear",
        2,
        typed(HYBRID, **LINEAR, **MLA, **MOE),
        dequantizes=("sdpa", "eager", "turboquant"),
    ),
    Row("olmo_hybrid", 2, typed(HYBRID, **LINEAR)),
    Row(
        "mamba2",
        0,
        {"num_heads": 8, "n_groups": 2, "state_size": 16, "chunk_size": 16},
        attentions=("eager",),
    ),
    VisionRow("qwen2_5_vl", 3, {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}),
    VisionRow("qwen3_5", 2, typed(HYBRID, **LINEAR)),
    VisionRow("qwen3_5_moe", 2, typed(HYBRID, **LINEAR, **MOE)),
    SpeechRow("whisper", 4, WHISPER),
    SpeechRow("whisper_full_cross", 2, WHISPER, model_type="whisper", cross=False),
    TextRow("t5", 4, T5),
    TextRow("t5_full_cross", 2, T5, model_type="t5", cross=False),
]


def parts(cache) -> list:
    pair = isinstance(cache, EncoderDecoderCache)
    return [cache.self_attention_cache, cache.cross_attention_cache] if pair else [cache]


def layers_of(cache) -> list:
    return [layer for part in parts(cache) for layer in part.layers]


def compressed_layers(cache) -> list[TurboQuantLayer]:
    return [layer for layer in layers_of(cache) if isinstance(layer, TurboQuantLayer)]


def disturb(cache) -> None:
    """Adds to all keys and values of full attention an error of the size that eight bits make."""
    generator = torch.Generator().manual_seed(2)
    for layer in layers_of(cache):
        if isinstance(layer, DynamicLayer) and not layer.is_sliding:
            for role in ("keys", "values"):
                states = getattr(layer, role)
                noise = torch.randn(states.shape, generator=generator) * states.shape[-1] ** -0.5
                setattr(layer, role, states + EIGHT_BITS * noise * states.norm(dim=-1, keepdim=True))


def errors(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative error of the logits of each token, of shape `[tokens]`."""
    return (logits - expected).norm(dim=-1) / expected.norm(dim=-1)


def typical(errors: torch.Tensor) -> float:
    # the geometric mean: a token whose attention is near a tie says more about the tie than about the codes
    return errors.log().mean().exp().item()


@pytest.fixture
def dequantized(monkeypatch) -> list[str]:
    """Roles of the handles whose codes were turned into plain tensors."""
    calls, dequantize = [], QuantizedStates.dequantize

    def spy(handle):
        if isinstance(handle.states, LayerStates):
            calls.append(handle.role)
        return dequantize(handle)

    monkeypatch.setattr(QuantizedStates, "dequantize", spy)
    return calls


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_logits_from_codes(row, dequantized, record_property):
    """Eight bits change the logits as much as noise of their size does, the same way whoever attends."""
    real = row.inputs()["attention_mask"].bool()
    prompt, steps = real.clone(), real.clone()
    prompt[:, PROMPT:] = steps[:, :PROMPT] = False
    default = row.model().config._attn_implementation
    full, from_codes, worst = {}, {}, 0.0
    for attention in dict.fromkeys((*row.attentions, default)):
        model = row.model(attention)
        expected = full[attention] = row.prefill_and_decode(model, row.full_cache(model.config))
        noisy = row.prefill_and_decode(model, row.full_cache(model.config), disturb)
        noise = typical(errors(noisy[steps], expected[steps]))
        for condition in ("attention", "none"):
            cache = row.cache(model.config, **ALL_CODES, condition=condition)
            dequantized.clear()
            logits = row.prefill_and_decode(model, cache)
            assert len(compressed_layers(cache)) == row.compressed
            # the first prefill attends to what it has just computed
            assert torch.equal(logits[prompt], expected[prompt])
            if row.compressed:
                error = errors(logits[steps], expected[steps])
                # what is wrong, not just inexact, is off by its own size
                assert noise / 3 < typical(error) < 1.5 * noise and error.max() < 0.2
                assert bool(dequantized) == (attention in row.dequantizes)
                worst = max(worst, error.max().item())
            else:
                assert torch.equal(logits, expected)
        if attention in row.attentions:
            first = row.attentions[0]
            from_codes[attention] = logits
            assert errors(expected[real], full[first][real]).max() < ROUNDING
            # with conditioning, codes depend on who shows the query; a rounding error before it may still turn one over
            assert errors(logits[steps], from_codes[first][steps]).max() < max(noise / 5, ROUNDING)
    count = f"{row.compressed} of {len(layers_of(cache))}"
    record_property(TABLE, f"| {row.name} | {count} | {100 * worst:.1f} % |")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_small_window(row):
    """`generate` runs, and just what should be is compressed, and reported."""
    model = row.model()
    full, cache = row.full_cache(model.config), row.cache(model.config, **SMALL_WINDOW)
    row.generate(model, full)
    tokens = row.generate(model, cache)
    assert tokens.shape == (BATCH, STEPS)
    compressed = compressed_layers(cache)
    assert len(compressed) == row.compressed
    for ours, theirs in zip(layers_of(cache), layers_of(full), strict=True):
        if ours in compressed:
            length = theirs.get_seq_length()
            assert ours.get_seq_length() == length and isinstance(ours, type(theirs))
            for buffer in ours.tokens.codes.values():
                assert buffer.length == length - sum(SMALL_WINDOW.values()) > 0
        else:
            assert type(ours) is type(theirs)
    for ours, theirs in zip(parts(cache), parts(full), strict=True):
        if isinstance(ours, TurboQuantCache):
            count = len(compressed_layers(ours))
            assert repr(ours).startswith(f"TurboQuantCache({count} of {len(theirs.layers)} layers compressed")
            report = ours.memory()
            assert (report.codes_bytes > 0) == (report.scales_bytes > 0) == (count > 0)
            assert report.full_bytes == held_bytes(theirs)


def held_bytes(cache) -> int:
    leaves = [leaf for layer in cache.layers for leaf in tree_leaves(vars(layer))]
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))


def test_sparse_attention_is_refused():
    row = next(row for row in ROWS if row.name == "deepseek_v32")
    model = row.model("turboquant")
    with pytest.raises(ValueError, match="does not know the `indices`"):
        row.prefill_and_decode(model, row.full_cache(model.config))
