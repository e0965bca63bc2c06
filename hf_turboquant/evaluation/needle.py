"""Needle in a haystack: a fact is hidden in a long text, and a question at its end is answered through the cache."""

import random
from functools import partial

import torch

from .._supported import cache_name
from .caches import new_cache

# Digits are copied one by one, and a question that repeats the needle's words needs no reasoning: this tests only the
# memory, even of a model too small to answer questions.
NEEDLE = " The secret code of the lighthouse is {code}. "
QUESTION = "\n\nThe secret code of the lighthouse is"


def haystack(tokenizer, text: str, length: int, depth: float, code: str) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Token ids, each of shape `[1, tokens]`: `length` tokens of the text with the needle at `depth` (0 first, 1 last),
    and the question. A `ValueError` if the text is too short.
    """
    needle, question, hay = (
        tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        for piece in (NEEDLE.format(code=code), QUESTION, text)
    )
    room = length - len(needle)
    if room < 1 or len(hay) < room:
        raise ValueError(
            f"A haystack of {length} tokens must have room for a needle of {len(needle)} and a text that fills it, got "
            f"{len(hay)} tokens. Take a longer text, or haystacks between {len(needle) + 1} and {len(hay)} tokens."
        )
    start = round(depth * room)
    ids = hay[:start] + needle + hay[start:room]
    return torch.tensor([ids]), torch.tensor([question])


@torch.inference_mode()
def find_needle(model, tokenizer, text: str, options: dict, length: int, depth: float) -> dict:
    """
    One cell of the grid, through a cache with `options` (see [`caches.new_cache`]): the haystack, see [`haystack`], is
    read at once, the question through the cache, and the answer is greedy. The code differs from cell to cell.

    Returns:
        `{"expected", "answer", "exact"}`: the code, what the model wrote, and whether they are the same.
    """
    code = str(random.Random(f"0 {length} {depth}").randrange(10_000, 100_000))
    context, inputs = (ids.to(model.device) for ids in haystack(tokenizer, text, length, depth, code))
    read = partial(model, **{cache_name(model): new_cache(model.config, options)}, logits_to_keep=1)
    answer, written = [], ""
    read(context)
    # A token holds at least one digit; one more token for a leading space.
    while len(answer) < len(code) + 1 and len(written.strip()) < len(code):
        inputs = read(inputs).logits[:, -1:].argmax(-1)
        answer.append(inputs.item())
        written = tokenizer.decode(answer)
    return {"expected": code, "answer": written, "exact": written.strip() == code}
