"""
Generate text through a compressed KV cache.

    python examples/generate.py
    python examples/generate.py --nbits 3 --compare
    python examples/generate.py --model Qwen/Qwen3-0.6B --prompt-file report.txt --question "What was decided?"
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from load_model import load
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import DynamicCache, TextStreamer

from hf_turboquant import TurboQuantCache

# long enough that most of it leaves the recent window and is compressed
PROMPT = """\
The lighthouse on Brannock Point was built in 1847 by Helena Marsh, an engineer from the harbour town of Tarn. \
Before that year, ships that carried coal and timber along the coast had to pass the point in daylight, because a \
reef of black rock lies just below the water there. In the winter of 1844 alone, eleven ships were lost on it. Marsh \
first proposed a tower of granite, but the quarry was too far away, and the fishermen who were to land the blocks \
refused to work so close to the reef. So she had the tower cast in iron plates instead. They were made in a foundry \
in Tarn, carried to the point by barge in the calm weeks of June, and bolted together from the inside. The whole \
tower, thirty metres high, stood after only nine weeks.

The first keeper was Tobias Finch, a retired sailor, who lived in the tower with his two daughters for twenty-six \
years. Every evening they carried oil up one hundred and forty steps to the lamp. The oil came from whales at first, \
and later from rape seed, which was cheaper and smoked less. Finch wrote down the weather four times a day, and his \
notebooks, which fill six shelves, are still used by people who study how the climate of the coast has changed. In \
all his years only one ship was lost on the reef: the Margaret, in the great fog of 1859, when no light could be \
seen at all. After that night a bell was hung beside the lamp, and it was rung by hand whenever fog came in.

Electricity reached the point in 1931, and since 1978 the lamp has been switched on and off by a clock. The tower is \
a museum now. Visitors can climb the steps on Sundays, ring the bell, and read the notebooks of Tobias Finch."""
QUESTION = "Write a short article about the lighthouse for the visitors of the museum."

CACHE_OPTIONS = ("nbits", "key_bits", "value_bits", "key_estimator", "residual_length")


class TimedStreamer(TextStreamer):
    """Shows the text as it comes, or a bar of the tokens, and keeps the time at which each token came."""

    def __init__(self, tokenizer, progress: Progress, show_text: bool):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.progress, self.show_text = progress, show_text
        self.times_s = []

    def put(self, value):
        if not self.next_tokens_are_prompt:
            self.times_s.append(time.perf_counter())
            self.progress.advance(self.progress.task_ids[0])
            if self.show_text and len(self.times_s) == 1:
                self.progress.stop()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False):
        if self.show_text:
            super().on_finalized_text(text, stream_end)

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed, from the median step: the first ones may compile kernels."""
        steps_s = [after - before for before, after in zip(self.times_s, self.times_s[1:], strict=False)]
        return 1 / statistics.median(steps_s) if steps_s else float("nan")


def encode(tokenizer, prompt: str):
    """The model's inputs, of shape `[1, prompt length]`, in the model's chat format where it has one."""
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def run(model, tokenizer, inputs, cache, max_new_tokens: int, console: Console, show_text: bool):
    """Greedy text through `cache`: the new tokens and the streamer that timed them."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        length = inputs["input_ids"].shape[1]
        progress.add_task(f"{type(cache).__name__}: {length:,} tokens read, then new ones", total=max_new_tokens)
        streamer = TimedStreamer(tokenizer, progress, show_text)
        output = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer
        )
    return output[0, length:], streamer


def held_bytes(cache: DynamicCache) -> int:
    """Bytes of every tensor in a cache of full precision."""
    held = [value for layer in cache.layers for value in vars(layer).values()]
    # linear-attention layers keep their states in dicts
    held += [value for states in held if isinstance(states, dict) for value in states.values()]
    return sum(value.nbytes for value in held if torch.is_tensor(value))


def comparison(tokenizer, results, on_cpu: bool) -> Table:
    """
    The two runs side by side.

    Args:
        results (`list`): (cache, new tokens, streamer) for the full and for the compressed cache.
        on_cpu (`bool`): leave out absolute speeds, which one run on shared cores does not tell.
    """
    (full_cache, full_tokens, full_timer), (cache, tokens, timer) = results
    caption = "one run on a CPU: take its speeds as a hint" if on_cpu else None
    table = Table(box=box.SIMPLE_HEAD, caption=caption)
    for header in ("", type(full_cache).__name__, type(cache).__name__):
        table.add_column(header, ratio=1 if header else None)
    texts = [escape(tokenizer.decode(t, skip_special_tokens=True)) for t in (full_tokens, tokens)]
    table.add_row("text", *texts, end_section=True)
    shorter = min(len(full_tokens), len(tokens))
    same = int((full_tokens[:shorter] == tokens[:shorter]).long().cumprod(0).sum())
    table.add_row("new tokens", str(len(full_tokens)), f"{len(tokens)}, the first {same} the same")
    speeds = ["1", f"{timer.tokens_per_s / full_timer.tokens_per_s:.2f} times that"]
    if not on_cpu:
        speeds = [f"{full_timer.tokens_per_s:.1f} tokens/s", f"{timer.tokens_per_s:.1f} tokens/s, {speeds[1]}"]
    table.add_row("decoding speed", *speeds)
    table.add_row("tokens in the cache", *(str(c.get_seq_length()) for c in (full_cache, cache)))
    report = cache.memory()
    ratio = f"{report.compression_ratio:.2f} times fewer per token"
    table.add_row("cache bytes", f"{held_bytes(full_cache):,}", f"{report.total_bytes:,}, {ratio}")
    return table


def main():
    parser = argparse.ArgumentParser(
        description="Generate text through a compressed KV cache. Cache options not given are TurboQuantCache's own."
    )
    parser.add_argument("--model", help="a Hub name or a local folder (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--prompt", help="the prompt (default: a text about a lighthouse, to be summarised)")
    parser.add_argument("--prompt-file", type=Path, help="a text file that takes the prompt's place")
    parser.add_argument("--question", help="asked below the prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--compare", action="store_true", help="the same through DynamicCache, side by side")
    # no defaults here: those of the cache stand in the package
    cache_group = parser.add_argument_group("cache", argument_default=argparse.SUPPRESS)
    cache_group.add_argument("--nbits", type=int, help="bits per coordinate of keys and values")
    cache_group.add_argument("--key-bits", type=int, help="for keys, in place of --nbits")
    cache_group.add_argument("--value-bits", type=int, help="for values, in place of --nbits")
    cache_group.add_argument("--key-estimator", choices=("qjl", "rescaled", "mse"))
    cache_group.add_argument("--residual-length", type=int, help="tokens in the exact recent window")
    args = parser.parse_args()
    if args.prompt and args.prompt_file:
        parser.error("give --prompt or --prompt-file, not both")
    options = {name: value for name, value in vars(args).items() if name in CACHE_OPTIONS}

    prompt, question = args.prompt, args.question
    if args.prompt_file:
        prompt = args.prompt_file.read_text(encoding="utf-8")
    elif prompt is None:
        prompt, question = PROMPT, question or QUESTION
    if question:
        prompt = f"{prompt}\n\n{question}"

    console = Console()
    with console.status("loading the model"):
        model, tokenizer = load(args.model)
    inputs = encode(tokenizer, prompt).to(model.device)
    caches = [TurboQuantCache(model.config, **options)]
    if args.compare:
        caches.insert(0, DynamicCache(config=model.config))
    results = [
        (cache, *run(model, tokenizer, inputs, cache, args.max_new_tokens, console, show_text=not args.compare))
        for cache in caches
    ]
    if args.compare:
        console.print(comparison(tokenizer, results, on_cpu=model.device.type == "cpu"))
    console.print(
        f"cache of {caches[-1].get_seq_length():,} tokens: {caches[-1].memory()}", highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    main()
