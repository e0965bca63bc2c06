"""The decoding loop behind `model.generate(..., custom_generate=hf_turboquant.generate)`."""

import inspect
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMode, StopStringCriteria
from transformers.generation.utils import GENERATION_MODES_MAPPING
from transformers.utils import logging

from .cache import TurboQuantCache
from .captured import Graph
from .config import KEYWORDS, TurboQuantConfig
from .decoding import run

logger = logging.get_logger(__name__)

# Capacity is rounded up to a multiple of this, so that a slightly longer request can reuse the cache.
ROOM_TOKENS = 256

# For each model, the cache of its last request and the key that a request must have to reuse it.
_kept: WeakKeyDictionary = WeakKeyDictionary()


def generate(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """
    `model.generate(**inputs, custom_generate=hf_turboquant.generate, max_new_tokens=200, nbits=4)`: greedy search and
    sampling over a [`TurboQuantCache`], on a GPU with steps captured as a CUDA graph.

    `generate` prepares everything and calls this in place of its own loop. All of its arguments keep their meaning;
    those of [`TurboQuantConfig`] configure the cache, and `max_cache_len` is its least capacity. You may pass a cache
    of any kind instead; steps are captured if its capacity is fixed. The next request with the same batch size reuses
    the memory and the graph. Anything but greedy search and sampling is passed on to transformers' own loop.

    Args:
        model (`PreTrainedModel`), input_ids (`torch.LongTensor` of shape `[batch, tokens]`): as `generate` passes them.
        logits_processor, stopping_criteria, generation_config, **model_kwargs: as `generate` has prepared them.

    Returns:
        As `generate` does: token ids of shape `[batch, tokens]`, or a `GenerateDecoderOnlyOutput`.

    Raises:
        `ValueError`: options come together with a cache, or [`TurboQuantCache`] raises it. A cache that was passed is
            then restored, if it can be cropped.
    """
    lost = _lost_arguments()
    options = {option.name: model_kwargs.pop(option.name) for option in KEYWORDS if option.name in model_kwargs}
    stop_strings, inputs_tensor = (model_kwargs.pop(name, None) for name in ("stop_strings", "inputs_tensor"))
    if stop_strings is not None:
        stopping_criteria.append(_stop_strings(lost.get("tokenizer"), stop_strings))
    prepared = {
        "logits_processor": logits_processor,
        "stopping_criteria": stopping_criteria,
        "generation_config": generation_config,
    }
    name = next((n for n in ("cache", "past_key_values") if isinstance(model_kwargs.get(n), Cache)), None)
    own = _is_our_choice(model_kwargs.get(name), options, generation_config)
    mode = generation_config.get_generation_mode(lost.get("assistant_model"))
    reason = _not_ours(model, mode, generation_config, name, lost)
    if reason is not None:
        if own:
            cache = _growing(model, options)
            if type(model_kwargs[name]) is EncoderDecoderCache:
                cache = EncoderDecoderCache(cache, model_kwargs[name].cross_attention_cache)
            model_kwargs[name] = cache
        lost["inputs_tensor"] = inputs_tensor
        return _hand_back(model, mode, reason, input_ids, lost, prepared, model_kwargs)
    returned, key = not own or generation_config.return_dict_in_generate, None
    if own:
        prompt = model_kwargs["inputs_embeds"] if model_kwargs.get("inputs_embeds") is not None else input_ids
        # The last token is never fed to the model.
        room = prompt.shape[1] + generation_config.max_length - input_ids.shape[1] - 1
        key, model_kwargs[name] = _take_cache(model, options, input_ids.shape[0], room)
    cache = model_kwargs[name]
    with torch.cuda.device_of(input_ids):
        out = run(model, input_ids, name, returned, lost.get("streamer"), **prepared, model_kwargs=model_kwargs)
    # Keeping a cache that grows would gain nothing.
    if not returned and cache.is_compileable:
        # A prompt that no step has followed is not quantized yet, and would be kept.
        cache.reset()
        _kept[model] = key, cache
    return out


def release(model) -> None:
    """Frees what is kept for the next request to `model`: the cache of the last request and its graphs."""
    _kept.pop(model, None)


# `generate` rejects keywords that neither it nor this signature lists.
generate.__signature__ = inspect.Signature(
    [
        *list(inspect.signature(generate).parameters.values())[:-1],
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in ("inputs_tensor", "stop_strings")
        ),
        *KEYWORDS,
        inspect.Parameter("model_kwargs", inspect.Parameter.VAR_KEYWORD),
    ]
)


def _lost_arguments() -> dict:
    """
    The keywords of the call of `generate` that led here. transformers (5.17 to 5.24) silently drops `streamer`,
    `tokenizer`, `assistant_model` and `synced_gpus` when it calls a callable, so that a consumer of the streamer would
    wait for ever. They are still in the frame of the decorator around `generate`.
    """
    frame = inspect.currentframe()
    while frame is not None:
        keywords = frame.f_locals.get("kwargs")
        if isinstance(keywords, dict) and keywords.get("custom_generate") is not None:
            return {name: value for name, value in keywords.items() if value is not None}
        frame = frame.f_back
    return {}


def _stop_strings(tokenizer, stop_strings) -> StopStringCriteria:
    if tokenizer is None:
        raise ValueError(f"`stop_strings` need the `tokenizer`, got {stop_strings!r} without. Pass `tokenizer=` too.")
    return StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings)


def _is_our_choice(cache: Cache | None, options: dict, config) -> bool:
    """Whether `generate` made the cache itself because the caller passed none."""
    own = type(cache) in (DynamicCache, EncoderDecoderCache) and not getattr(cache, "_is_user_defined", False)
    own = own and config.cache_implementation is None
    if options and not own:
        raise ValueError(
            f"Options of the cache must not come with another cache, got {options} and {type(cache).__name__}. Give "
            "them to `TurboQuantCache(model.config, ...)` and pass that, or leave the cache out."
        )
    return own


def _growing(model, options: dict) -> TurboQuantCache:
    return TurboQuantCache(model.config, **options | {"max_cache_len": None})


def _not_ours(model, mode, config, name, lost) -> str | None:
    """The requested feature that this loop does not support, or `None`."""
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return mode.value.replace("_", " ")
    if model.config.is_encoder_decoder:
        return "an encoder and a decoder"
    if config.output_attentions or config.output_hidden_states:
        return "attentions and hidden states"
    if lost.get("synced_gpus"):
        return "`synced_gpus`"
    return "a model without `use_cache`" if name is None or config.use_cache is False else None


def _hand_back(model, mode, reason, input_ids, lost, prepared, model_kwargs):
    """Continues in transformers' own loop."""
    method = GENERATION_MODES_MAPPING[mode]
    if "/" in method:
        raise ValueError(
            f"What `hf_turboquant.generate` runs must be greedy search, sampling, beam search or a draft, got "
            f"{reason}. Pass `custom_generate='{method}'` and a `TurboQuantCache` as the cache."
        )
    logger.warning_once(f"`hf_turboquant.generate` leaves {reason} to the loop of transformers, over the same cache.")
    method = getattr(type(model), method)
    names = inspect.signature(method).parameters.keys() - prepared.keys() - {"self", "input_ids", "model_kwargs"}
    if mode == GenerationMode.BEAM_SEARCH and "streamer" in lost:
        raise ValueError("`streamer` must not come with beam search, got one. Leave it out, or set `num_beams=1`.")
    extra = {name: lost[name] for name in names if lost.get(name) is not None}
    return method(model, input_ids, **prepared, **extra, **model_kwargs)


def _take_cache(model, options: dict, batch: int, room: int) -> tuple[tuple, TurboQuantCache]:
    """
    Returns the key under which a cache is kept, and an empty one with a capacity of at least `room` tokens: that of the
    last request, or a new one, which grows if no graph can be captured.
    """
    config = TurboQuantConfig(**options)
    room = max(room, config.max_cache_len or 1)
    # Tensors made in inference mode cannot be written to outside of it.
    mode = torch.is_inference_mode_enabled()
    key = batch, replace(config, max_cache_len=None), model.dtype, model.device, mode
    kept_key, cache = _kept.pop(model, (None, None))
    if kept_key == key and room <= cache.options.max_cache_len <= 2 * room + ROOM_TOKENS:
        cache.reset()
        return key, cache
    # Free the old memory first.
    del cache
    if Graph.runs_on(model):
        try:
            room = -(-room // ROOM_TOKENS) * ROOM_TOKENS
            return key, TurboQuantCache(model.config, **options | {"max_cache_len": room})
        except ValueError as error:
            # Some layers have no kind of fixed capacity.
            logger.warning_once(f"`hf_turboquant.generate` goes on without CUDA graphs: {error}")
    return key, _growing(model, options)
