"""What it takes to save a whole cache and to make sure that it comes back to the right model."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer

from . import saving
from .config import TurboQuantConfig
from .hybrid import TurboQuantHybridLayer
from .layer import TurboQuantLayer
from .snapshot import restore_layer

# what a saved cache says of its model, to be told from another
MODEL_FIELDS = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
MODEL_FIELDS += ("head_dim", "vocab_size", "layer_types")
LAYER_ARGUMENTS = ("sliding_window", "number_of_states")
# the layers that can be saved; those that models bring along may keep anything
SAVED_LAYERS = {kind.__name__: kind for kind in (*DYNAMIC_LAYER_TYPE_MAPPING.values(), DynamicLayer)}
SAVED_LAYERS = {name: kind for name, kind in SAVED_LAYERS.items() if kind.__module__ == DynamicLayer.__module__}
SAVED_LAYERS |= {kind.__name__: kind for kind in (TurboQuantLayer, TurboQuantHybridLayer)}


def save_cache(cache, folder: str | Path) -> None:
    """[`TurboQuantCache.save_pretrained`]."""
    if cache.options.max_cache_len is not None:
        raise ValueError(
            f"Only caches that grow can be saved, got one with `max_cache_len={cache.options.max_cache_len}`. Prefill "
            "the text into one without it, and save that."
        )
    for index, layer in enumerate(cache.layers):
        if SAVED_LAYERS.get(type(layer).__name__) is not type(layer):
            raise ValueError(
                f"Every layer must be one of {sorted(SAVED_LAYERS)} to be saved, got {type(layer).__name__} at "
                f"layer {index}: it may keep tokens in ways of its own. Prefill the text again instead."
            )
    # negative indices need a model to count from its end
    options = {**asdict(cache.options), "skip_layers": sorted(cache.skipped)}
    lazy = cache.layer_class_to_replicate is not None
    about = {"transformers": transformers.__version__, "options": options, "model": cache.model_fields, "lazy": lazy}
    saving.save(folder, cache.layers, about)


def load_cache(cls, folder: str | Path, config: PreTrainedConfig | None, device):
    """[`TurboQuantCache.from_pretrained`]."""
    header, states = saving.read(folder, torch.device(device or "cpu"))
    with saving.refusing(folder):
        options = asdict(TurboQuantConfig(**header["options"]))
        model, lazy = header["model"] and dict(header["model"]), header["lazy"]
    cache = cls(None, **options)
    cache.model_fields = model
    with saving.refusing(folder):
        for index, state in enumerate(states):
            layer = _new_layer(cache.options, index, state)
            restore_layer(layer, state)
            cache.layers.append(layer)
    if not lazy:
        cache.layer_class_to_replicate = None
    if config is not None:
        _check_model(cache, folder, config)
    return cache


def model_fields(config: PreTrainedConfig) -> dict:
    """What tells a model from another, as json has it."""
    # not by attribute: where layers differ, the config refuses to name one value for all of them
    text = config.get_text_config(decoder=True).to_dict()
    return json.loads(json.dumps({name: text.get(name) for name in MODEL_FIELDS}, default=str))


def _new_layer(options: TurboQuantConfig, index: int, state: dict):
    kind = SAVED_LAYERS[state["kind"]]
    if kind is TurboQuantLayer:
        return TurboQuantLayer(options, index)
    given = {name: state["fields"][name] for name in LAYER_ARGUMENTS if name in state["fields"]}
    return TurboQuantHybridLayer(options, index, **given) if kind is TurboQuantHybridLayer else kind(**given)


def _check_model(cache, folder: str | Path, config: PreTrainedConfig) -> None:
    def kind(layer) -> tuple:
        return type(layer).__name__, *(getattr(layer, name, None) for name in LAYER_ARGUMENTS)

    fields, count = model_fields(config), len(DynamicCache(config=config).layers)
    compared = [(name, held, fields.get(name)) for name, held in (cache.model_fields or {}).items()]
    # fields come and go between releases of transformers
    compared = [pair for pair in compared if None not in pair] + [("number of layers", len(cache.layers), count)]
    if len(cache.layers) == count:
        pairs = zip(cache.layers, type(cache)(config, **asdict(cache.options)).layers, strict=True)
        compared += [(f"layer {i}", kind(held), kind(given)) for i, (held, given) in enumerate(pairs)]
    for what, held, given in compared:
        if held == given:
            continue
        raise ValueError(
            f"`config` must be of the model whose tokens {folder} holds: its {what} is {held}, got {given}. Load "
            "it with that model, or prefill the text again with this one."
        )
