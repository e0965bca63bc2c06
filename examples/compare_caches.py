"""
Generate from the same text through several caches and compare their output, speed and bytes.

    python examples/compare_caches.py
    python examples/compare_caches.py --caches dynamic turboquant:nbits=3,key_estimator=rescaled quanto:nbits=4
    python examples/compare_caches.py --model Qwen/Qwen3-0.6B --prompt-file report.txt --question "What was decided?"
"""

import statistics
import time
from itertools import pairwise
from pathlib import Path

from load_model import TEXT, encode, load, parser
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

from hf_turboquant._supported import cache_name
from hf_turboquant.evaluation.caches import held_bytes, label, new_cache, parse

QUESTION = "Write a short article about the lighthouse for the visitors of the museum."


class Clock(BaseStreamer):
    """Records the time at which each token came."""

    def __init__(self):
        self.times_s = []

    def put(self, value):
        self.times_s.append(time.perf_counter())

    def end(self):
        pass

    @property
    def step_s(self) -> float:
        """The median step, because the first entry is the prompt and the first steps may compile kernels."""
        steps_s = [after - before for before, after in pairwise(self.times_s[1:])]
        return statistics.median(steps_s) if steps_s else float("nan")


def main():
    arguments = parser("The same text through several caches.")
    arguments.add_argument("--prompt-file", type=Path, help="default: a text about a lighthouse")
    arguments.add_argument("--question", default=QUESTION, help="asked below the prompt")
    arguments.add_argument("--max-new-tokens", type=int, default=128)
    default = ["dynamic", "turboquant:nbits=4"]
    arguments.add_argument("--caches", nargs="+", default=default, help="the others are compared with the first")
    args = arguments.parse_args()
    try:
        caches = [options for spec in args.caches for options in parse(spec)]
    except ValueError as error:
        arguments.error(str(error))

    console = Console()
    with console.status("loading the model"):
        model, tokenizer = load(args.model)
    text = (args.prompt_file or TEXT).read_text(encoding="utf-8")
    inputs = encode(tokenizer, f"{text}\n\n{args.question}").to(model.device)
    caption = "one run on a CPU: take its speeds as a hint" if model.device.type == "cpu" else None
    table = Table(box=box.SIMPLE_HEAD, caption=caption)
    columns, first, length = [], None, inputs["input_ids"].shape[1]
    for options in caches:
        cache, clock = new_cache(model.config, options), Clock()
        with console.status(f"{label(options)}: {length:,} tokens read, then new ones"):
            inputs[cache_name(model)] = cache
            output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False, streamer=clock)
        tokens = output[0, length:]
        held = cache.memory().total_bytes if hasattr(cache, "memory") else held_bytes(cache)
        first = first or (tokens, clock.step_s, held)
        shorter = min(len(first[0]), len(tokens))
        same = int((first[0][:shorter] == tokens[:shorter]).long().cumprod(0).sum())
        columns.append(
            (
                escape(tokenizer.decode(tokens, skip_special_tokens=True)),
                f"{len(tokens)}, the first {same} the same",
                f"{first[1] / clock.step_s:.2f} times",
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
