"""The decoding loop behind `model.generate(..., custom_generate=hf_turboquant.generate)`."""

import inspect
import logging
from dataclasses import fields, replace
from functools import cache as once
from weakref import WeakKeyDictionary

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMode, StopStringCriteria
from transformers.generation.utils import GENERATION_MODES_MAPPING

from .cache import TurboQuantCache
from .captured import Graph
from .config import TurboQuantConfig
from .decoding import run

logger = logging.getLogger(__name__)

OPTIONS = tuple(field.name for field in fields(TurboQuantConfig))
# room is taken in pieces of so many tokens: a request that is a little longer finds enough
ROOM_TOKENS = 256

# by model, the cache of its last request, for the next one like it, and the key of what it is like
_kept: WeakKeyDictionary = WeakKeyDictionary()


@once
def _say(message: str) -> None:
    logger.warning(message)


def generate(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """
    `model.generate(**inputs, custom_generate=hf_turboquant.generate, max_new_tokens=200, nbits=4)`: greedy search and
    sampling over a [`TurboQuantCache`], on a GPU by steps that are captured as a CUDA graph.

    `generate` prepares everything and calls this in place of its own loop; all its arguments mean what they do there,
    and those of [`TurboQuantConfig`] are those of the cache, `max_cache_len` the least room. A cache may be given
    instead, of any kind; steps are captured over those of static capacity. The next request of a batch like this takes
    the memory and the graph over. What is neither greedy search nor sampling goes on in transformers' own loop.

    Args:
        model (`PreTrainedModel`), input_ids (`torch.LongTensor` of shape `[batch, tokens]`): as `generate` passes them.
        logits_processor, stopping_criteria, generation_config, **model_kwargs: as `generate` has prepared them.

    Returns:
        As `generate`: token ids of shape `[batch, tokens]`, or a `GenerateDecoderOnlyOutput`.

    Raises:
        `ValueError`: options come with a cache, or as [`TurboQuantCache`]. A cache that was given is then as before,
            where it can be cropped.
    """
    lost = _lost_arguments()
    options = {name: model_kwargs.pop(name) for name in OPTIONS if name in model_kwargs}
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
            model_kwargs[name] = _growing(model, options, model_kwargs[name])
        lost["inputs_tensor"] = inputs_tensor
        return _hand_back(model, mode, reason, input_ids, lost, prepared, model_kwargs)
    returned, key = not own or generation_config.return_dict_in_generate, None
    if own:
        prompt = model_kwargs["inputs_embeds"] if model_kwargs.get("inputs_embeds") is not None else input_ids
        # the last token is never read
        room = prompt.shape[1] + generation_config.max_length - input_ids.shape[1] - 1
        key, model_kwargs[name] = _take_cache(model, options, input_ids.shape[0], room)
    cache = model_kwargs[name]
    with torch.cuda.device_of(input_ids):
        out = run(model, input_ids, name, returned, lost.get("streamer"), **prepared, model_kwargs=model_kwargs)
    # one that grows gains nothing from being kept
    if not returned and cache.is_compileable:
        _kept[model] = key, cache
    return out


def release(model) -> None:
    """Frees what is kept for the next request to `model`: the cache of the last one, and its graphs."""
    _kept.pop(model, None)


# `generate` takes from its keywords those that stand here, before it looks for ones that nobody knows
generate.__signature__ = inspect.Signature(
    [
        *list(inspect.signature(generate).parameters.values())[:-1],
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in ("inputs_tensor", "stop_strings")
        ),
        *(
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(TurboQuantConfig).parameters.values()
        ),
        inspect.Parameter("model_kwargs", inspect.Parameter.VAR_KEYWORD),
    ]
)


def _lost_arguments() -> dict:
    """
    The keywords of the call of `generate` that led here. transformers (5.17 to 5.24) hands neither `streamer` nor
    `tokenizer`, `assistant_model` and `synced_gpus` to a callable, and says nothing: whoever listens to a streamer
    would wait for ever. They are still in the frame of the decorator around `generate`.
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
    """Whether the cache is one that `generate` has made because nobody said which."""
    own = type(cache) in (DynamicCache, EncoderDecoderCache) and not getattr(cache, "_is_user_defined", False)
    own = own and config.cache_implementation is None
    if options and not own:
        raise ValueError(
            f"Options of the cache must not come with another cache, got {options} and {type(cache).__name__}. Give "
            "them to `TurboQuantCache(model.config, ...)` and pass that, or leave the cache out."
        )
    return own


def _growing(model, options: dict, made: Cache) -> Cache:
    """A cache that grows, in place of the one that `generate` has made."""
    cache = TurboQuantCache(model.config, **{**options, "max_cache_len": None})
    return EncoderDecoderCache(cache, made.cross_attention_cache) if type(made) is EncoderDecoderCache else cache


def _not_ours(model, mode, config, name, lost) -> str | None:
    """What this loop does not do of what is asked for, or `None`."""
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
    """Goes on in transformers' own loop."""
    method = GENERATION_MODES_MAPPING[mode]
    if "/" in method:
        raise ValueError(
            f"`custom_generate=hf_turboquant.generate` must be greedy search, sampling, beam search or a draft, got "
            f"{reason}. Pass `custom_generate='{method}'` and a `TurboQuantCache` as the cache."
        )
    _say(f"`hf_turboquant.generate` leaves {reason} to the loop of transformers, over the same cache.")
    method = getattr(type(model), method)
    names = inspect.signature(method).parameters.keys() - prepared.keys() - {"self", "input_ids", "model_kwargs"}
    if mode == GenerationMode.BEAM_SEARCH and "streamer" in lost:
        raise ValueError("`streamer` must not come with beam search, got one. Leave it out, or set `num_beams=1`.")
    extra = {name: lost[name] for name in names if lost.get(name) is not None}
    return method(model, input_ids, **prepared, **extra, **model_kwargs)


def _take_cache(model, options: dict, batch: int, room: int) -> tuple[tuple, TurboQuantCache]:
    """
    A cache without tokens, with `room` for so many: that of the last request, or a new one; where no graph can be
    captured, one that grows. And the key under which it is kept.
    """
    config = TurboQuantConfig(**options)
    room = max(room, config.max_cache_len or 1)
    # what is made in inference mode cannot be written to elsewhere
    mode = torch.is_inference_mode_enabled()
    key = batch, replace(config, max_cache_len=None), model.dtype, model.device, mode
    kept_key, cache = _kept.pop(model, (None, None))
    if kept_key == key and room <= cache.options.max_cache_len <= 2 * room + ROOM_TOKENS:
        cache.reset()
        return key, cache
    # the old memory goes first
    del cache
    if Graph.runs_on(model):
        try:
            return key, TurboQuantCache(
                model.config, **{**options, "max_cache_len": -(-room // ROOM_TOKENS) * ROOM_TOKENS}
            )
        except ValueError as error:
            # some layers have no static kind
            _say(f"`hf_turboquant.generate` goes on without CUDA graphs: {error}")
    return key, TurboQuantCache(model.config, **{**options, "max_cache_len": None})
