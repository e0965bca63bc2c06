"""What a model's config says of its heads: their width, and how rotary position embeddings (RoPE) turn them."""

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def head_dim(text_config: PreTrainedConfig) -> int:
    """Dimensions of a head, also where the config leaves them to be derived."""
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def rotary_frequencies(config: PreTrainedConfig, layer_idx: int) -> list[float] | None:
    """
    By how many radians each pair of channels turns from one position to the next; `None` where the config doesn't tell.
    """
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = getattr(text, "layer_types", None) or ()
    kind = kinds[layer_idx] if layer_idx < len(kinds) else None
    # one for every type of layer, or one for all
    by_kind = isinstance(rope.get(kind), dict)
    parameters = rope[kind] if by_kind else rope
    try:
        if parameters.get("rope_type", "default") != "default":
            make = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
            return make(text, torch.device("cpu"), layer_type=kind if by_kind else None)[0].tolist()
        width = int(head_dim(text) * parameters.get("partial_rotary_factor", 1.0))
        return [parameters["rope_theta"] ** (-i / width) for i in range(0, width, 2)]
    except (AttributeError, KeyError, TypeError, ValueError):
        # no such embedding, or one that only the model's code understands
        return None
