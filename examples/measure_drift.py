"""
Measure whether conditioning that was frozen early goes stale: KL to the full cache for every 400 tokens, over a prompt
of 200 tokens and 3,000 more that the model samples or that come from another text.

    python examples/measure_drift.py --text book.txt
    python examples/measure_drift.py --text book.txt --then reference

KL rises along a text in any case: at first most tokens are exact, later nearly all are codes. Drift is the difference
from the same cache with statistics of the whole text, `whole`; `none` is not conditioned.
"""

from functools import partial
from pathlib import Path

import torch
from load_model import load, parser
from report import add_caches, show, table

from hf_turboquant import TurboQuantCache
from hf_turboquant._supported import cache_name
from hf_turboquant.cli import run
from hf_turboquant.evaluation.caches import label, new_cache, parse
from hf_turboquant.evaluation.load import read_text
from hf_turboquant.evaluation.quality import Full, split_windows


def informed(model, ids: torch.Tensor, options: dict) -> TurboQuantCache:
    """An empty cache whose conditioning comes from `ids`, of shape `[1, tokens]`."""
    cache = new_cache(model.config, options)
    model(ids, **{cache_name(model): cache}, logits_to_keep=1)
    cache.crop(1 - ids.shape[1])
    for layer in cache.layers:
        # The last token goes another way, because a layer that loses all of them forgets the statistics too.
        layer.tokens.crop(0)
    return cache


def drift(model, sequences: torch.Tensor, caches: list[dict], prompt: int, stretch: int, block: int) -> dict:
    """
    Mean KL of every stretch, of shape `[stretches]`, by name of a cache and statistics, over sequences of shape
    `[sequences, length]`, each of which has its own caches. The prefill has `prompt` tokens, a stretch has `stretch`, a
    multiple of `block`, the tokens fed at a time.
    """
    sums = {}
    for ids in sequences.to(model.device).split(1):
        full = Full(model, ids, block=block, prefill=prompt, score_from=prompt)
        for options in caches:
            held = {"prompt": new_cache(model.config, options), "whole": informed(model, ids, options)}
            held["none"] = new_cache(model.config, {**options, "condition": "none"})
            for name, cache in held.items():
                # The last stretch is one token shorter, because the last token has no next one.
                means = torch.stack([part.mean() for part in torch.tensor(full.compare(cache).kls).split(stretch)])
                key = label(options), name
                sums[key] = sums.get(key, 0) + means / len(sequences)
    return sums


def rows(found: dict[tuple[str, str], torch.Tensor], prompt: int, stretch: int) -> str:
    """A markdown table: all stretches, the last relative to the first and to the same stretch of `whole`."""
    starts = range(prompt, prompt + stretch * len(next(iter(found.values()))), stretch)
    columns = ["cache", "statistics", *(f"from {start:,}" for start in starts), "last : first", "last : whole's"]
    cells = []
    for (name, statistics), means in found.items():
        ratios = means[-1] / means[0], means[-1] / found[name, "whole"][-1]
        cells.append((name, statistics, *(f"{kl:.4f}" for kl in means), *(f"{ratio:.2f}" for ratio in ratios)))
    return table(columns, cells)


def main():
    arguments = parser("KL along a text, of caches whose conditioning was frozen early.")
    add = partial(arguments.add_argument, type=int)
    arguments.add_argument("--text", required=True, help="text file that the prompts come from, or `reference`")
    arguments.add_argument("--then", help="text to continue with in place of the model's samples")
    # With a short window too, so that more of the first tokens are codes.
    keys = "turboquant:nbits=3,key_estimator=rescaled", "turboquant:nbits=3,residual_length=32"
    add_caches(arguments, "turboquant:nbits=4/3", *keys)
    add("--sequences", default=4, help="prompts, one after the other in the text")
    add("--prompt", default=200, help="tokens of a prompt")
    add("--tokens", default=3000, help="tokens after the prompt")
    add("--stretch", default=400, help="tokens that are averaged")
    add("--block", default=100, help="tokens fed at a time")
    args = arguments.parse_args()
    if args.stretch % args.block:
        arguments.error(f"--stretch must be a multiple of --block, got {args.stretch} and {args.block}. Change one.")

    caches = parse(*args.caches)
    model, tokenizer = load(args.model, "float32")
    sequences = split_windows(tokenizer, read_text(args.text), args.prompt, args.sequences)
    if args.then:
        rest = split_windows(tokenizer, read_text(args.then), args.tokens, args.sequences)
        sequences = torch.cat([sequences, rest], dim=1)
    else:
        torch.manual_seed(0)
        # Sampled, because a small model repeats itself in greedy search.
        sampling = {"do_sample": True, "top_k": 50, "max_new_tokens": args.tokens, "min_new_tokens": args.tokens}
        prompts = sequences.to(model.device)
        sequences = model.generate(prompts, attention_mask=torch.ones_like(prompts), **sampling)
    found = drift(model, sequences, caches, args.prompt, args.stretch, args.block)
    then = f"of {Path(args.then).name}" if args.then else "sampled"
    sizes = f"{args.sequences} prompts of {args.prompt} tokens of {Path(args.text).name}, then {args.tokens:,} {then}"
    blocks = f"KL (nats) by stretches of {args.stretch}, fed in blocks of {args.block}"
    show(model, args.model, (sizes, blocks), rows(found, args.prompt, args.stretch))


if __name__ == "__main__":
    raise SystemExit(run(main))
