"""Every family of models against `DynamicCache`: a family is a row."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_turboquant import QuantizedStates, TurboQuantCache
from hf_turboquant.layer import TurboQuantLayer

BATCH, PROMPT, PADDING, STEPS, VOCAB = 2, 40, 7, 6, 97
LEFT_OUT = object()

# eight bits and no exact window: every token that attention reads comes from the codes
ALL_CODES = {"nbits": 8, "key_estimator": "rescaled", "residual_length": 0, "sink_length": 0}
# the relative error of a vector in eight bits: sqrt(2.72) / 2**8 for a fine Gaussian quantiser
EIGHT_BITS = 0.0065
# defaults, with a window small enough for the prompt to leave it
SMALL_WINDOW = {"residual_length": 8, "sink_length": 2}

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
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]


@dataclass(frozen=True, eq=False)
class Row:
    """
    A tiny model of one family.

    Args:
        compressed (`int`): so many of its layers hold full attention.
        attentions (`tuple[str, ...]`): what transformers lets `attn_implementation` be for it.
        dequantizes (`tuple[str, ...]`): of these, the ones that can't attend straight from the codes, for a reason
            that stands beside the row.
    """

    name: str
    compressed: int
    options: dict = field(default_factory=dict)
    model_type: str | None = None
    attentions: tuple[str, ...] = ("sdpa", "eager", "turboquant")
    dequantizes: tuple[str, ...] = ("eager",)

    def config(self):
        model_type = self.model_type or self.name
        if model_type not in CONFIG_MAPPING:
            pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
        options = {name: value for name, value in {**SIZES, **self.options}.items() if value is not LEFT_OUT}
        return AutoConfig.for_model(model_type, **copy.deepcopy(options))

    def model(self, attention: str | None = None):
        torch.manual_seed(0)
        options = {"attn_implementation": attention} if attention else {}
        return AutoModelForCausalLM.from_config(self.config(), **options).eval()

    def inputs(self) -> dict[str, torch.Tensor]:
        """A prompt and the tokens after it; the second row is padded on the left."""
        input_ids = torch.randint(3, VOCAB, (BATCH, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
        attention_mask = torch.ones_like(input_ids)
        input_ids[1, :PADDING] = attention_mask[1, :PADDING] = 0
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def prefill_and_decode(self, model, cache, after_prefill=lambda cache: None) -> torch.Tensor:
        """Logits of all positions: the prompt at once, then token by token."""
        inputs = self.inputs()
        outputs, start = [], 0
        with torch.no_grad():
            for stop in range(PROMPT, PROMPT + STEPS + 1):
                ids, mask = inputs["input_ids"][:, start:stop], inputs["attention_mask"][:, :stop]
                outputs.append(model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits)
                if start == 0:
                    after_prefill(cache)
                start = stop
        return torch.cat(outputs, dim=1)


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
    Row("gemma2", 2, typed(SLIDING, sliding_window=16, query_pre_attn_scalar=16, attn_logit_softcapping=5.0)),
    Row("gemma3", 2, typed(SLIDING, sliding_window=16, query_pre_attn_scalar=16), model_type="gemma3_text"),
    Row("gpt_oss", 2, typed(SLIDING, sliding_window=16, **MOE)),
    Row("phi3", 3),
    Row("falcon", 3, {"head_dim": LEFT_OUT}),
    Row("gpt2", 3, {"n_embd": 64, "n_head": 4, "n_layer": 3}),
    Row("gpt_neox", 3),
    Row("deepseek_v3", 3, {**MLA, **MOE}),
    Row("qwen3_next", 2, typed(HYBRID, **LINEAR, **MOE, shared_expert_intermediate_size=48)),
    Row("qwen3_5", 2, typed(HYBRID, **LINEAR), model_type="qwen3_5_text"),
    Row("qwen3_5_moe", 2, typed(HYBRID, **LINEAR, **MOE), model_type="qwen3_5_moe_text"),
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
    Row("kimi_linear", 2, typed(HYBRID, **LINEAR, **MLA, **MOE)),
    Row("olmo_hybrid", 2, typed(HYBRID, **LINEAR)),
    Row("mamba2", 0, {"num_heads": 8, "n_groups": 2, "state_size": 16, "chunk_size": 16}),
]


def compressed_layers(cache) -> list[TurboQuantLayer]:
    return [layer for layer in cache.layers if isinstance(layer, TurboQuantLayer)]


def disturb(cache: DynamicCache) -> None:
    """Adds to all keys and values of full attention an error of the size that eight bits make."""
    generator = torch.Generator().manual_seed(2)
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and not layer.is_sliding and layer.is_initialized:
            for role in ("keys", "values"):
                states = getattr(layer, role)
                noise = torch.randn(states.shape, generator=generator) * states.shape[-1] ** -0.5
                setattr(layer, role, states + EIGHT_BITS * noise * states.norm(dim=-1, keepdim=True))


def difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of all logits of the decode steps together."""
    logits, expected = logits[:, PROMPT:], expected[:, PROMPT:]
    return ((logits - expected).norm() / expected.norm()).item()


@pytest.fixture
def dequantized(monkeypatch) -> list[str]:
    """Roles of the handles that were turned into plain tensors."""
    calls = []
    dequantize = QuantizedStates.dequantize
    monkeypatch.setattr(
        QuantizedStates, "dequantize", lambda handle: calls.append(handle.role) or dequantize(handle)
    )
    return calls


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_logits_from_codes(row, dequantized):
    """Eight bits change the logits as much as noise of their size does, and whoever attends, it's from the same codes."""
    logits = {}
    for attention in (None, *row.attentions):
        model = row.model(attention)
        expected = row.prefill_and_decode(model, DynamicCache(config=model.config))
        noisy = row.prefill_and_decode(model, DynamicCache(config=model.config), disturb)
        cache = TurboQuantCache(model.config, **ALL_CODES)
        dequantized.clear()
        logits[attention] = row.prefill_and_decode(model, cache)
        real = row.inputs()["attention_mask"][:, :PROMPT].bool()
        torch.testing.assert_close(logits[attention][:, :PROMPT][real], expected[:, :PROMPT][real], rtol=0, atol=0)
        error, noise = difference(logits[attention], expected), difference(noisy, expected)
        print(f"{row.name} {attention} error {error:.5f} noise {noise:.5f} ratio {error / max(noise, 1e-9):.2f} deq {len(dequantized)}")
        assert len(compressed_layers(cache)) == row.compressed
        if not row.compressed:
            assert error == 0
            continue
        if attention:
            assert bool(dequantized) == (attention in row.dequantizes), attention
    for attention in row.attentions:
        print("   agree", attention, difference(logits[attention], logits[None]))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_small_window(row):
    """Just what should be is compressed, and reported."""
    model = row.model()
    inputs = {name: tensor[:, :PROMPT] for name, tensor in row.inputs().items()}
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    full, cache = DynamicCache(config=model.config), TurboQuantCache(model.config, **SMALL_WINDOW)
    model.generate(**inputs, **options, past_key_values=full)
    tokens = model.generate(**inputs, **options, past_key_values=cache)
    assert tokens.shape == (BATCH, PROMPT + STEPS)
    layers = compressed_layers(cache)
    assert len(layers) == row.compressed
    assert repr(cache).startswith(f"TurboQuantCache({row.compressed} of {len(full.layers)} layers compressed")
    for ours, theirs in zip(cache.layers, full.layers, strict=True):
        assert isinstance(ours, type(theirs)) if ours in layers else type(ours) is type(theirs)
    # the last token generated was never fed back
    length = PROMPT + STEPS - 1
    for layer in layers:
        assert layer.get_seq_length() == length
        assert {role: buffer.length for role, buffer in layer.codes.items()} == dict.fromkeys(
            ("keys", "values"), length - sum(SMALL_WINDOW.values())
        )
    report = cache.memory()
    assert (report.codes_bytes > 0) == (report.scales_bytes > 0) == (row.compressed > 0)
    held = [leaf for layer in full.layers for leaf in tree_leaves(vars(layer)) if isinstance(leaf, torch.Tensor)]
    assert report.full_bytes == sum(tensor.nbytes for tensor in held)
