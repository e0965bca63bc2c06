"""One request: a prefill, then steps; the host looks at each token while the next step runs."""

from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from transformers import Cache
from transformers.generation import GenerateDecoderOnlyOutput

from .captured import Steps, fingerprint, store_prompt
from .layer import TurboQuantLayer

# For each cache, the steps that were captured over it.
_steps: WeakKeyDictionary = WeakKeyDictionary()


def run(
    model, input_ids, name, returned, streamer, logits_processor, stopping_criteria, generation_config, model_kwargs
):
    """One request over the cache `model_kwargs[name]`, which the caller goes on to use if `returned`."""
    cache = model_kwargs[name]
    before = int(cache.get_seq_length())
    # Otherwise chunks of a prefill would be compiled.
    generation_config.disable_compile = True
    try:
        with _first_token_first(cache):
            outputs = model._prefill(input_ids, generation_config, model_kwargs)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits = outputs.logits[:, -1].clone()
        # Some models return logits of all prompt tokens, which take much memory.
        del outputs
        steps = None

        def step(ids: torch.Tensor) -> torch.Tensor:
            nonlocal steps
            if steps is None:
                # The first token is out already: comparing fingerprints takes longer than a step.
                steps = _begin(model, name, model_kwargs, ids)
            return steps(ids)

        ahead = _can_crop(cache) or not returned
        # Experts are computed differently in decoding than in the prefill.
        with model._optimize_model_for_decode():
            ids, scores, raw_logits, surplus = _decode(
                step, logits, input_ids, logits_processor, stopping_criteria, generation_config, streamer, ahead
            )
        if returned:
            store_prompt(cache)
            if surplus:
                cache.crop(-surplus)
    except BaseException:
        _roll_back(cache, before)
        raise
    if steps is not None:
        steps.finish()
        _steps[cache] = steps
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return ids
    return GenerateDecoderOnlyOutput(sequences=ids, scores=scores, logits=raw_logits, **{name: cache})


def _begin(model, name: str, model_kwargs: dict, ids: torch.Tensor) -> Steps:
    """The steps of a request: those captured for an earlier one, if nothing that they rely on has changed."""
    cache = model_kwargs[name]
    steps, mark = _steps.pop(cache, None), fingerprint(model, cache)
    if steps is None or steps.fingerprint != mark:
        steps = Steps(mark)
    steps.start(model, name, model_kwargs, ids)
    return steps


def _decode(step, logits, ids, logits_processor, stopping_criteria, config, streamer, ahead):
    """
    Chooses tokens until all sequences have ended. With `ahead`, a step is launched before the host looks at the token
    that the step reads, so that the GPU never waits for the host.

    Args:
        step (`Callable`): gives the logits after ids `[batch, tokens]`, of which only the last is new.
        logits (`torch.Tensor`): after the prompt, of shape `[batch, vocab_size]`.

    Returns:
        Token ids of shape `[batch, tokens]`, the recorded scores and logits, and the number of tokens by which the
        cache is too long.
    """
    scores = () if config.return_dict_in_generate and config.output_scores else None
    raw_logits = () if config.return_dict_in_generate and config.output_logits else None
    pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
    max_length = stopping_criteria.max_length
    host, first = _Beside(ids.device), True
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
        # The first token comes out before the first step, which has much to prepare. A step whose token would exceed
        # the limit is not even launched.
        begun = ahead and not first and (max_length is None or ids.shape[1] < max_length)
        first = False
        if begun:
            logits = step(ids)
        with host.looks():
            unfinished = unfinished & ~stopping_criteria(ids, scores)
            if streamer is not None:
                streamer.put(tokens.cpu())
            ended = not unfinished.any().item()
        if ended:
            return ids, scores, raw_logits, int(begun)
        if not begun:
            logits = step(ids)


@contextmanager
def _first_token_first(cache: Cache):
    """Within this context, layers of fixed capacity leave quantizing a short prompt to [`captured.store_prompt`]."""
    layers = [layer for layer in cache.layers if isinstance(layer, TurboQuantLayer) and layer.fixed]
    for layer in layers:
        layer.defers = True
    try:
        yield
    finally:
        for layer in layers:
            layer.defers = False


class _Beside:
    """A second stream, to read results from before `mark` without waiting for later work; does nothing on a CPU."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.marked: torch.cuda.Event | None = None

    def mark(self) -> None:
        """Marks everything launched until now as what will be looked at."""
        if self.stream is not None:
            self.marked = torch.cuda.current_stream().record_event()

    @contextmanager
    def looks(self):
        """Within this context, waiting for the GPU means waiting for marked work only; later work goes on meanwhile."""
        if self.stream is None:
            yield
            return
        self.stream.wait_event(self.marked)
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)


def _can_crop(cache: Cache) -> bool:
    """Whether tokens can be removed without having told the layers in advance to remember earlier states."""
    return cache.is_croppable and not any(hasattr(layer, "record_past") for layer in cache.layers)


def _roll_back(cache: Cache, length: int) -> None:
    """Removes the tokens that a failed request left in a cache, even if only some layers have received them."""
    if length == 0:
        cache.reset()
    elif _can_crop(cache):
        for layer in cache.layers:
            surplus = int(layer.get_seq_length()) - length
            if surplus > 0:
                layer.crop(-surplus)
