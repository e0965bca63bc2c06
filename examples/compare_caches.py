"""
Ask a question about a document through several caches: compare the answers, and sizes with that of the first cache.

    python examples/compare_caches.py
    python examples/compare_caches.py --caches dynamic turboquant:nbits=4/2 quanto:nbits=4
    python examples/compare_caches.py --model Qwen/Qwen3-0.6B --prompt-file report.txt --question "What was decided?"
"""

import statistics

from load_model import QUESTION, TEXT, encode, load, parser
from report import add_caches
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import hf_turboquant
from hf_turboquant._supported import cache_name
from hf_turboquant.cli import run
from hf_turboquant.evaluation.benchmark import Times
from hf_turboquant.evaluation.caches import held_bytes, label, new_cache, parse
from hf_turboquant.evaluation.load import read_text
from hf_turboquant.memory import readable


def ask(model, inputs, options: dict, tokens: int):
    """New tokens of shape `[tokens]`, the cache that holds them, and the median time of a step (ms)."""
    # Our own loop makes the cache from its options.
    how, times = {"custom_generate": hf_turboquant.generate, **options}, Times()
    if how.pop("cache") != "turboquant":
        how = {cache_name(model): new_cache(model.config, options)}
    how |= {"streamer": times, "max_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True}
    found = model.generate(**inputs, **how)
    # The first steps may compile kernels.
    step_ms = statistics.median(times.steps_s) * 1e3 if times.steps_s else float("nan")
    # The name is another one from transformers 5.24 on.
    held = found.get("cache") or found.get("past_key_values")
    return found.sequences[0, inputs["input_ids"].shape[1] :], held, step_ms


def main():
    arguments = parser("The same question about a document through several caches.")
    arguments.add_argument("--prompt-file", default=str(TEXT), help="the document, a text file")
    arguments.add_argument("--question", default=QUESTION, help="asked below the document")
    arguments.add_argument("--max-new-tokens", type=int, default=32, help="most tokens of an answer")
    add_caches(arguments, "dynamic", "turboquant:nbits=4")
    args = arguments.parse_args()
    caches = parse(*args.caches)
    text = read_text(args.prompt_file)

    console = Console()
    with console.status("loading the model"):
        model, tokenizer = load(args.model)
    for options in caches:
        new_cache(model.config, options)
    inputs = encode(tokenizer, f"{text}\n\n{args.question}").to(model.device)
    table = Table("", box=box.SIMPLE_HEAD, title=args.question)
    names, columns = ["answer", "tokens in the cache", "size of the cache", "times smaller"], []
    # On a CPU attention from codes saves memory, not time.
    names += ["ms a token"] if model.device.type == "cuda" else []
    first = None
    for options in caches:
        table.add_column(label(options), ratio=1)
        with console.status(f"{label(options)}: {inputs['input_ids'].shape[1]:,} tokens read, then the answer"):
            tokens, cache, step_ms = ask(model, inputs, options, args.max_new_tokens)
        held = held_bytes(cache)
        first = first or held
        answer = escape(tokenizer.decode(tokens, skip_special_tokens=True).strip())
        columns.append((answer, f"{cache.get_seq_length():,}", readable(held), f"{first / held:.1f}", f"{step_ms:.1f}"))
    for name, *row in zip(names, *columns, strict=False):
        table.add_row(name, *row, end_section=name == "answer")
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(run(main))
