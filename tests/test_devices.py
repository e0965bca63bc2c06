"""`device_map`: every layer of the cache lives where its layer of the model does."""

import copy

import pytest
import torch
from accelerate import dispatch_model
from test_models import ALL_CODES, PROMPT, ROWS, STEPS, compressed_layers
from transformers import LlamaConfig, LlamaForCausalLM

from hf_turboquant import TurboQuantCache
from hf_turboquant._supported import cache_name

SECOND = "cuda:1" if torch.cuda.device_count() > 1 else "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="one device only: a GPU is needed beside the CPU")
@pytest.mark.parametrize("name", ("llama_gqa", "gemma3", "qwen3_next"))
@pytest.mark.parametrize("static", (False, True))
def test_layers_on_two_devices(name, static):
    row = next(row for row in ROWS if row.name == name)
    model = row.model()
    inputs = {name: tensor[:, :PROMPT].cuda() for name, tensor in row.inputs().items()}
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    count = model.config.num_hidden_layers
    where = ["cuda:0", "cuda:0", SECOND, SECOND, SECOND][:count]
    device_map = {"model.embed_tokens": "cuda:0", "model.rotary_emb": "cuda:0", "model.norm": SECOND}
    # shares its weights with the embedding in some models
    device_map |= {"lm_head": "cuda:0", **{f"model.layers.{index}": device for index, device in enumerate(where)}}
    capacity = {"max_cache_len": PROMPT + STEPS} if static else {}
    results = []
    for new_cache in (row.full_cache, lambda config: TurboQuantCache(config, **ALL_CODES, **capacity)):
        # accelerate runs what is on the CPU there only if that is the main device
        twin = dispatch_model(row.model(), device_map, main_device="cpu", skip_keys=model._skip_keys_device_placement)
        cache = new_cache(model.config)
        results.append(twin.generate(**inputs, **{cache_name(twin): cache}, **options))
    for index, layer in enumerate(cache.layers):
        if layer in compressed_layers(cache):
            layer.measure()
            held = [
                layer.tokens.exact["keys"],
                *layer.tokens.codes["keys"].tensors.values(),
                layer.tokens.quantizers["keys"].transform,
            ]
            assert {tensor.device for tensor in held} == {torch.device(where[index])}
            assert layer.tokens.quantized == PROMPT + STEPS - 1
    assert torch.equal(*results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
@pytest.mark.parametrize("capacity", ({}, {"max_cache_len": 320}))
def test_kernels_run_where_the_layer_is(capacity):
    """Layers on both GPUs give the tokens of one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=98, initializer_range=0.1, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).cuda()
    ids = torch.randint(3, 98, (2, 300), device="cuda")
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    around = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), 0)
    spread = {**around, **{f"model.layers.{index}": index % 2 for index in range(4)}}
    results = []
    for device_map in ({"": 0}, spread):
        cache = TurboQuantCache(config, backend="triton", **capacity)
        twin = dispatch_model(copy.deepcopy(model), device_map, skip_keys=model._skip_keys_device_placement)
        results.append(twin.generate(ids, attention_mask=torch.ones_like(ids), **{cache_name(twin): cache}, **options))
    assert [layer.tokens.codes["keys"]["scales"].device.index for layer in cache.layers] == [0, 1, 0, 1]
    assert cache.memory().codes_bytes > 0 and torch.equal(*results)
