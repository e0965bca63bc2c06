"""`device_map`: every layer of the cache lives where its layer of the model does."""

import pytest
import torch
from accelerate import dispatch_model
from test_models import ALL_CODES, PROMPT, ROWS, STEPS, compressed_layers

from hf_turboquant import TurboQuantCache

SECOND = "cuda:1" if torch.cuda.device_count() > 1 else "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="one device only: a GPU is needed beside the CPU")
@pytest.mark.parametrize("name", ("llama_gqa", "gemma3", "qwen3_next"))
def test_layers_on_two_devices(name):
    row = next(row for row in ROWS if row.name == name)
    model = row.model()
    inputs = {name: tensor[:, :PROMPT].cuda() for name, tensor in row.inputs().items()}
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    count = model.config.num_hidden_layers
    where = ["cuda:0", "cuda:0", SECOND, SECOND, SECOND][:count]
    device_map = {"model.embed_tokens": "cuda:0", "model.rotary_emb": "cuda:0", "model.norm": SECOND}
    # shares its weights with the embedding in some models
    device_map |= {"lm_head": "cuda:0", **{f"model.layers.{index}": device for index, device in enumerate(where)}}
    results = []
    for new_cache in (row.full_cache, lambda config: TurboQuantCache(config, **ALL_CODES)):
        # accelerate runs what is on the CPU there only if that is the main device
        twin = dispatch_model(row.model(), device_map, main_device="cpu", skip_keys=model._skip_keys_device_placement)
        cache = new_cache(model.config)
        results.append(twin.generate(**inputs, past_key_values=cache, **options))
    for index, layer in enumerate(cache.layers):
        if layer in compressed_layers(cache):
            held = [layer.exact["keys"], *layer.codes["keys"].tensors.values(), layer.quantizers["keys"].transform]
            assert {tensor.device for tensor in held} == {torch.device(where[index])}
            assert layer.codes["keys"].length == PROMPT + STEPS - 1
    assert torch.equal(*results)
