"""One request: a prefill, then steps, each of whose tokens is looked at while the next step is under way."""

from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from transformers import Cache
from transformers.generation import GenerateDecoderOnlyOutput

from .captured import Steps, fingerprint

# by cache, those that were captured over it
_steps: WeakKeyDictionary = WeakKeyDictionary()


def run(
    model, input_ids, name, returned, streamer, logits_processor, stopping_criteria, generation_config, model_kwargs
):
    """One request over the cache in `model_kwargs[name]`; `returned` is whether somebody sees it afterwards."""
    cache = model_kwargs[name]
    before = int(cache.get_seq_length())
    # chunks of a prefill would be compiled
    generation_config.disable_compile = True
    try:
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits = outputs.logits[:, -1].clone()
        # those of all tokens of the prompt take much memory, where a model makes them
        del outputs
        steps, mark = _steps.pop(cache, None), fingerprint(model, cache)
        if steps is None or steps.fingerprint != mark:
            steps = Steps(mark)
        steps.start(model, name, model_kwargs)
        ahead = _can_crop(cache) or not returned
        # experts are computed in another way than in the prefill
        with model._optimize_model_for_decode():
            ids, scores, raw_logits, surplus = _decode(
                steps, logits, input_ids, logits_processor, stopping_criteria, generation_config, streamer, ahead
            )
        if surplus and returned:
            cache.crop(-surplus)
    except BaseException:
        _roll_back(cache, before)
        raise
    steps.finish()
    _steps[cache] = steps
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return ids
    return GenerateDecoderOnlyOutput(sequences=ids, scores=scores, logits=raw_logits, **{name: cache})


def _decode(steps, logits, ids, logits_processor, stopping_criteria, config, streamer, ahead):
    """
    Chooses tokens until all sequences have ended. With `ahead`, the next step is under way while the host looks at the
    token that it reads: the GPU never waits for that.

    Args:
        logits (`torch.Tensor`): after the prompt, of shape `[batch, vocab_size]`.

    Returns:
        Token ids of shape `[batch, tokens]`, what is recorded of scores and logits, and how many tokens the cache has
        got too many.
    """
    scores = () if config.return_dict_in_generate and config.output_scores else None
    raw_logits = () if config.return_dict_in_generate and config.output_logits else None
    pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
    max_length = stopping_criteria.max_length
    host = _Beside(ids.device)
    while True:
        next_logits = logits.to(device=ids.device, dtype=torch.float32, copy=True)
        next_scores = logits_processor(ids, next_logits)
        if scores is not None:
            scores += (next_scores,)
        if raw_logits is not None:
            raw_logits += (next_logits,)
        if config.do_sample:
            tokens = torch.multinomial(next_scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = next_scores.argmax(-1)
        if pads:
            pad = config._pad_token_tensor.to(ids.device)
            tokens = tokens * unfinished + pad * (1 - unfinished)
        ids = torch.cat([ids, tokens[:, None]], dim=-1)
        host.mark()
        # a step that is known to be the last one is not even begun
        begun = ahead and (max_length is None or ids.shape[1] < max_length)
        if begun:
            logits = steps(ids)
        with host.looks():
            unfinished = unfinished & ~stopping_criteria(ids, scores)
            if streamer is not None:
                streamer.put(tokens.cpu())
            ended = not unfinished.any().item()
        if ended:
            return ids, scores, raw_logits, int(begun)
        if not begun:
            logits = steps(ids)


class _Beside:
    """A stream beside the current one, for looks at what was there when `mark` was called; without a GPU, nothing."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.marked: torch.cuda.Event | None = None

    def mark(self) -> None:
        """What was launched until now is what will be looked at."""
        if self.stream is not None:
            self.marked = torch.cuda.current_stream().record_event()

    @contextmanager
    def looks(self):
        """Within it, waiting for the GPU is waiting for what was marked; the current stream goes on behind it."""
        if self.stream is None:
            yield
            return
        self.stream.wait_event(self.marked)
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)


def _can_crop(cache: Cache) -> bool:
    """Whether tokens can be taken back that nobody has asked layers to remember."""
    return cache.is_croppable and not any(hasattr(layer, "record_past") for layer in cache.layers)


def _roll_back(cache: Cache, length: int) -> None:
    """Takes from a cache what a request that failed has left in it, also where only some of its layers have got it."""
    if length == 0:
        cache.reset()
    elif _can_crop(cache):
        for layer in cache.layers:
            surplus = int(layer.get_seq_length()) - length
            if surplus > 0:
                layer.crop(-surplus)
