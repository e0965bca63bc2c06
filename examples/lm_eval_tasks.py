"""
Run tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) through the full cache and compressed ones.

    python examples/lm_eval_tasks.py                                # three sentences about a lighthouse
    python examples/lm_eval_tasks.py --model meta-llama/Llama-3.1-8B --tasks longbench_qasper longbench_lcc
    python examples/lm_eval_tasks.py --model meta-llama/Llama-3.1-8B --tasks niah_multikey_2 --max-seq-lengths 32768
    python examples/lm_eval_tasks.py --model MODEL --tasks my_task --include-path FOLDER_OF_YAML --limit 100

Everything is lm-eval's own: tasks, prompts, metrics, and its model of transformers, HFLM. Only two methods change.
HFLM scores a text in one forward pass without a cache. With a cache, such a pass would still attend to exact keys and
values, and measure nothing. Here a prompt is read in chunks, to score it as well as before an answer is generated. From
the second chunk on, attention reads codes, except for the first 4 and the most recent 128 tokens. Prompts shorter than
that measure nothing: the first row of the table says how many bits the caches really took.

The package lm_eval suffices for most tasks; RULER and LongBench need its extras of these names. All tasks but the
default ones fetch their data from the Hub.
"""

from functools import partial

import torch
from load_model import TEXT, load, parser
from report import add_caches, show, table

from hf_turboquant._supported import cache_name
from hf_turboquant.cli import run
from hf_turboquant.evaluation.caches import FULL, bits_per_coordinate, label, new_cache, parse

SENTENCES = [
    {"sentence": "The lighthouse was built in 1847 by", "end": "Helena Marsh", "other": "Tobias Finch"},
    {"sentence": "The first keeper was", "end": "Tobias Finch", "other": "Helena Marsh"},
    {"sentence": "The lens came from", "end": "Paris", "other": "Tarn"},
]


class ThroughCache:
    """
    What changes in HFLM: both of its calls of the model read their prompt through a cache with these `options` (see
    [`caches.new_cache`]), `chunk` tokens at a time.
    """

    def __init__(self, options: dict, chunk: int, **arguments):
        super().__init__(**arguments)
        self.options, self.chunk = options, chunk
        self.bits: list[float] = []

    @torch.no_grad()
    def _model_call(self, inps: torch.Tensor, **_) -> torch.Tensor:
        cache = new_cache(self.model.config, self.options)
        read = partial(self.model, **{cache_name(self.model): cache})
        logits = torch.cat([read(chunk).logits for chunk in inps.split(self.chunk, dim=1)], dim=1)
        self.bits.append(bits_per_coordinate(cache, with_exact=True))
        return logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **arguments) -> torch.Tensor:
        cache = new_cache(self.model.config, self.options)
        arguments |= {cache_name(self.model): cache, "prefill_chunk_size": self.chunk}
        output = super()._model_generate(context, max_length, stop, **arguments)
        self.bits.append(bits_per_coordinate(cache, with_exact=True))
        return output


def lighthouse() -> list[dict]:
    """Two tasks that need no Hub, on sentences from a text: a choice between ends, which are scored, and writing."""
    from datasets import Dataset

    paragraphs = TEXT.read_text(encoding="utf-8").split("\n\n")
    # About 420 tokens, for CPUs.
    text = "\n\n".join([*paragraphs[:3], "{{sentence}}"])
    shared = {"custom_dataset": lambda **_: {"test": Dataset.from_list(SENTENCES)}, "test_split": "test"}
    shared |= {"dataset_path": "", "doc_to_text": text}
    mean = {"aggregation": "mean", "higher_is_better": True}
    choose = {"task": "lighthouse_choose", "output_type": "multiple_choice", "doc_to_target": 0}
    choose |= {"doc_to_choice": lambda doc: [doc["end"], doc["other"]], "metric_list": [{"metric": "acc", **mean}]}
    write = {"task": "lighthouse_write", "output_type": "generate_until", "doc_to_target": "{{end}}"}
    write["generation_kwargs"] = {"until": ["."], "max_gen_toks": 8, "do_sample": False}
    # Whether the end is in what the model writes.
    write["process_results"] = lambda doc, found: {"contains": float(doc["end"] in found[0])}
    write["metric_list"] = [{"metric": "contains", **mean}]
    return [shared | choose, shared | write]


def main():
    arguments = parser("Tasks of lm-eval through the full cache and compressed ones.")
    add = arguments.add_argument
    add("--tasks", nargs="+", help="names of lm-eval tasks (default: two about a lighthouse, which need no Hub)")
    add_caches(arguments, "turboquant:nbits=4/3/2")
    add("--chunk", type=int, default=256, help="tokens of a prompt that are read at a time")
    add("--limit", type=int, help="documents of each task (default: all)")
    add("--include-path", help="a folder of tasks of your own, as yaml files")
    add("--max-seq-lengths", type=int, nargs="+", help="tokens of RULER's contexts")
    add("--apply-chat-template", action="store_true", help="put prompts into the model's chat format")
    args = arguments.parse_args()
    caches = parse(*args.caches)
    # Heavy, and installed by few.
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = load(args.model)
    metadata = {"tokenizer": tokenizer.name_or_path}
    if args.max_seq_lengths:
        metadata["max_seq_lengths"] = args.max_seq_lengths
    kind, scores = type("HFLM", (ThroughCache, HFLM), {}), {}
    for options in [FULL, *caches]:
        judged = kind(options, args.chunk, pretrained=model, tokenizer=tokenizer, batch_size=1)
        found = simple_evaluate(
            judged,
            tasks=args.tasks or lighthouse(),
            task_manager=TaskManager(include_path=args.include_path, metadata=metadata),
            limit=args.limit,
            apply_chat_template=args.apply_chat_template,
            bootstrap_iters=0,
        )
        scores.setdefault("bits, exact tokens included", []).append(f"{sum(judged.bits) / len(judged.bits):.2f}")
        for task, metrics in found["results"].items():
            for metric, value in metrics.items():
                if isinstance(value, float) and "stderr" not in metric:
                    scores.setdefault(f"{task}, {metric.removesuffix(',none')}", []).append(f"{value:.3f}")
    found = table(["", "full cache", *map(label, caches)], ((name, *cells) for name, cells in scores.items()))
    show(model, args.model, (f"prompts in chunks of {args.chunk} tokens",), found)


if __name__ == "__main__":
    raise SystemExit(run(main))
