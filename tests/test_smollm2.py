"""A real pretrained model through the cache: SmolLM2-135M-Instruct, head_dim 64, 3 KV heads."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache
from transformers.generation import CompileConfig

from hf_turboquant import TurboQuantCache, TurboQuantConfig, ops
from hf_turboquant._supported import cache_name
from hf_turboquant.evaluation.quality import measure, split_windows
from hf_turboquant.quantizer import Quantizer

TEXT = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")


def test_8_bits_write_the_same_200_tokens(smollm2):
    model, tokenizer = smollm2
    ids = split_windows(tokenizer, TEXT, 1500, 1).to(model.device)
    options = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False}
    caches = DynamicCache(config=model.config), TurboQuantCache(model.config, nbits=8)
    full, ours = (
        model.generate(ids, attention_mask=torch.ones_like(ids), **{cache_name(model): cache}, **options)[0]
        for cache in caches
    )
    assert caches[1].layers[0].tokens.quantized == 1699 - 128 - 4
    if torch.equal(full, ours):
        return
    # a first difference is allowed where the full cache itself all but ties
    first = int((full != ours).nonzero()[0])
    with torch.inference_mode():
        logits = model(full[None, :first]).logits[0, -1].float()
    gap = logits[full[first]] - logits[ours[first]]
    assert gap < 0.02 * logits.std(), f"tokens differ from {first - 1500} on, where the logits are {gap:.3f} apart"


def test_compiled_steps_write_what_steps_of_the_growing_cache_write(smollm2):
    model, tokenizer = smollm2
    ids = split_windows(tokenizer, TEXT, 400, 1).to(model.device)
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    # otherwise only GPUs compile
    config._compile_all_devices = True
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    grown = model.generate(ids, **{cache_name(model): TurboQuantCache(model.config)}, **options)
    torch.compiler.reset()
    counters.clear()
    cache = TurboQuantCache(model.config, max_cache_len=464)
    assert torch.equal(model.generate(ids, **{cache_name(model): cache}, compile_config=config, **options), grown)
    assert counters["stats"]["unique_graphs"] == 1 and cache.layers[0].condition == "attention"


@pytest.fixture(scope="module")
def qualities(smollm2):
    model, tokenizer = smollm2
    windows = split_windows(tokenizer, TEXT, 640, 1)
    configurations = [{"key_estimator": e, "nbits": b} for b in (4, 2) for e in ("mse", "rescaled", "qjl")]
    names = ["full", *(f"{c['key_estimator']} {c['nbits']}" for c in configurations)]
    return dict(zip(names, measure(model, windows, configurations), strict=True))


def test_quality_of_the_estimators(qualities):
    assert qualities["full"].kl == 0 and qualities["full"].agreement == 1
    kl = {name: quality.kl for name, quality in qualities.items()}
    # codes and signs that are chosen together lose nothing at 4 bits and win at 2, where one bit more is worth a third
    assert kl["rescaled 4"] < 1.2 * kl["mse 4"] and kl["qjl 4"] < 1.2 * kl["rescaled 4"]
    assert kl["qjl 4"] < kl["qjl 2"] < 0.85 * kl["rescaled 2"] and kl["mse 4"] < kl["mse 2"]
    assert 0 < kl["qjl 4"] < 0.02
    assert qualities["qjl 4"].perplexity == pytest.approx(qualities["full"].perplexity, rel=0.05)
    assert qualities["qjl 4"].agreement > 0.9
    assert qualities["qjl 2"].compression_ratio > qualities["qjl 4"].compression_ratio > 1.5


@pytest.fixture(scope="module")
def real_keys(smollm2):
    """Keys of a prefill less their mean, `[heads, tokens, 64]`: those of all layers and KV heads."""
    model, tokenizer = smollm2
    ids = split_windows(tokenizer, TEXT, 512, 1).to(model.device)
    with torch.inference_mode():
        cache = model(ids, **{cache_name(model): DynamicCache(config=model.config)})[cache_name(model)]
    keys = torch.cat([layer.keys[0].float().cpu() for layer in cache.layers])[:, 4:]
    return keys - keys.mean(1, keepdim=True)


@pytest.mark.parametrize("nbits", (2, 3, 4, 8))
@pytest.mark.parametrize("head_dim", (64, 80, 128, 256))
@pytest.mark.parametrize("real", (True, False), ids=("real", "random"))
def test_scores_are_unbiased(real_keys, real, head_dim, nbits):
    keys = real_keys
    if not real:
        keys = torch.randn(keys.shape, generator=torch.Generator().manual_seed(0))
    # heads of other widths from those of this model, side by side
    heads, tokens, _ = keys.shape
    wide = keys[: heads // 4 * 4].unflatten(0, (-1, 4)).transpose(1, 2).reshape(-1, tokens, 256)[..., :head_dim]
    slopes = []
    for seed in range(6):
        quantizer = Quantizer.create(TurboQuantConfig(nbits=nbits, seed=seed), "keys", 0, head_dim)
        codes, scales = ops.reference.encode(wide[None], quantizer)
        read = (ops.reference.decode(codes, scales, quantizer) @ quantizer.dual)[0]
        # every key asks for all keys of its head
        exact, estimate = wide @ wide.mT, wide @ read.mT
        # ⟨k, k̂⟩ = |k|² holds for every single key, so those are no evidence
        others = ~torch.eye(tokens, dtype=torch.bool)
        exact, estimate = exact[:, others], estimate[:, others]
        slopes.append((exact * estimate).sum() / exact.square().sum())
    assert torch.stack(slopes).mean().item() == pytest.approx(1, abs=0.01)
