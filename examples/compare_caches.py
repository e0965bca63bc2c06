"""
The same text through several caches, side by side: what they write, how fast, in how many bytes.

    python examples/compare_caches.py
    python examples/compare_caches.py --caches dynamic turboquant:nbits=3,key_estimator=rescaled quanto:nbits=4
    python examples/compare_caches.py --model Qwen/Qwen3-0.6B --prompt-file report.txt --question "What was decided?"
"""

import argparse
import statistics
import time
from pathlib import Path

from load_model import TEXT, encode, load
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

from hf_turboquant.evaluation.caches import held_bytes, label, new_cache, parse

QUESTION = "Write a short article about the lighthouse for the visitors of the museum."


class Timer(BaseStreamer):
    """Keeps the time at which each token came, and shows how many."""

    def __init__(self, progress: Progress):
        self.progress, self.times_s = progress, []

    def put(self, value):
        # the prompt comes first
        self.times_s.append(time.perf_counter())
        self.progress.update(self.progress.task_ids[0], completed=len(self.times_s) - 1)

    def end(self):
        pass

    @property
    def step_s(self) -> float:
        """The median step: the first ones may compile kernels."""
        steps_s = [after - before for before, after in zip(self.times_s[1:], self.times_s[2:], strict=False)]
        return statistics.median(steps_s) if steps_s else float("nan")


def run(model, inputs, cache, name: str, max_new_tokens: int, console: Console):
    """Greedy text through `cache`: the new tokens and the seconds of a step."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        length = inputs["input_ids"].shape[1]
        progress.add_task(f"{name}: {length:,} tokens read, then new ones", total=max_new_tokens)
        timer = Timer(progress)
        output = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False, streamer=timer
        )
    return output[0, length:], timer.step_s


def main():
    parser = argparse.ArgumentParser(description="The same text through several caches.")
    parser.add_argument("--model", help="a Hub name or a local folder (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--prompt-file", type=Path, help="default: a text about a lighthouse")
    parser.add_argument("--question", default=QUESTION, help="asked below the prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--caches", nargs="+", default=["dynamic", "turboquant:nbits=4"], help="the first is the measure"
    )
    args = parser.parse_args()
    try:
        caches = [options for spec in args.caches for options in parse(spec)]
    except ValueError as error:
        parser.error(str(error))

    console = Console()
    with console.status("loading the model"):
        model, tokenizer = load(args.model)
    text = (args.prompt_file or TEXT).read_text(encoding="utf-8")
    inputs = encode(tokenizer, f"{text}\n\n{args.question}").to(model.device)
    caption = "one run on a CPU: take its speeds as a hint" if model.device.type == "cpu" else None
    table = Table(box=box.SIMPLE_HEAD, caption=caption)
    columns, first = [], None
    for options in caches:
        cache = new_cache(model.config, options)
        tokens, step_s = run(model, inputs, cache, label(options), args.max_new_tokens, console)
        held = cache.memory().total_bytes if hasattr(cache, "memory") else held_bytes(cache)
        first = first or (tokens, step_s, held)
        shorter = min(len(first[0]), len(tokens))
        same = int((first[0][:shorter] == tokens[:shorter]).long().cumprod(0).sum())
        columns.append(
            (
                escape(tokenizer.decode(tokens, skip_special_tokens=True)),
                f"{len(tokens)}, the first {same} the same",
                f"{first[1] / step_s:.2f} times",
                f"{cache.get_seq_length():,}",
                f"{held:,}",
                f"{first[2] / held:.2f} times fewer",
            )
        )
    for header in ("", *map(label, caches)):
        table.add_column(header, ratio=1 if header else None)
    rows = "text", "new tokens", "decoding speed", "tokens in the cache", "bytes in the cache", ""
    for index, name in enumerate(rows):
        table.add_row(name, *(column[index] for column in columns), end_section=not index)
    console.print(table)


if __name__ == "__main__":
    main()
