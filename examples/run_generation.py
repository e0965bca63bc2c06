"""
Generate text through the cache of your choice, with the arguments of transformers' script of this name.

    python examples/run_generation.py
    python examples/run_generation.py --cache turboquant --nbits 3 --prompt "Once upon a time" --temperature 0.7
    python examples/run_generation.py --cache turboquant:key_bits=8,value_bits=4 --prompt_file report.txt
    python examples/run_generation.py --model_name_or_path Qwen/Qwen3-0.6B --prompt_file report.txt --question "Why?"
"""

import argparse

from load_model import QUESTION, TEXT, encode, load
from transformers import TextStreamer, set_seed

from hf_turboquant._supported import cache_name
from hf_turboquant.cli import Formatter, run
from hf_turboquant.evaluation.caches import held_bytes, new_cache, parse
from hf_turboquant.evaluation.load import read_text
from hf_turboquant.memory import readable


def parse_args():
    about = "Cache options not given are those of the cache."
    parser = argparse.ArgumentParser(description=about, formatter_class=Formatter)
    add = parser.add_argument
    add("--model_name_or_path", help="a Hub name or a local folder (default: SmolLM2-135M-Instruct)")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="default: a text about a lighthouse, and a question about it")
    prompt.add_argument("--prompt_file", help="a text file to use as the prompt")
    add("--question", help="asked below the prompt")
    add("--length", type=int, default=128, help="new tokens at most")
    add("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    add("--repetition_penalty", type=float, default=1.0, help="above 1, repeating is less likely")
    add("--k", type=int, default=50, help="sample from this many most likely tokens")
    add("--p", type=float, default=0.9, help="sample from this probability mass")
    add("--num_beams", type=int, default=1, help="beams of a search")
    add("--num_return_sequences", type=int, default=1, help="texts to generate")
    add("--seed", type=int, default=42, help="seed of the samples")
    add("--use_cpu", action="store_true", help="even where there is a GPU")
    add("--fp16", action="store_true", help="weights in float16")
    add("--cache", default="turboquant", metavar="SPEC", help="KIND:OPTION=VALUE,..., such as turboquant:nbits=3")
    add("--nbits", help="bits per coordinate of keys and values of --cache turboquant")
    args = parser.parse_args()
    if args.nbits is not None and args.cache != "turboquant":
        parser.error("--nbits belongs to --cache turboquant; with other options give it as turboquant:nbits=...")
    args.cache, *others = parse(args.cache if args.nbits is None else f"turboquant:nbits={args.nbits}")
    if others:
        parser.error("--cache must be one cache, without slashes between values")
    if args.num_return_sequences > args.num_beams and not args.temperature:
        parser.error("--num_return_sequences needs as many --num_beams, or a --temperature above 0")
    return args


def main():
    args = parse_args()
    prompt, question = args.prompt, args.question
    if prompt is None:
        prompt = read_text(args.prompt_file or str(TEXT))
        question = question or (None if args.prompt_file else QUESTION)
    if question:
        prompt = f"{prompt}\n\n{question}"

    set_seed(args.seed)
    model, tokenizer = load(args.model_name_or_path, "float16" if args.fp16 else None, "cpu" if args.use_cpu else None)
    inputs, cache = encode(tokenizer, prompt).to(model.device), new_cache(model.config, args.cache)
    how = {"do_sample": False, cache_name(model): cache, "max_new_tokens": args.length}
    if args.temperature:
        how |= {"do_sample": True, "temperature": args.temperature, "top_k": args.k, "top_p": args.p}
    for name in ("repetition_penalty", "num_beams", "num_return_sequences"):
        how[name] = getattr(args, name)
    single = args.num_return_sequences == args.num_beams == 1
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if single else None
    output = model.generate(**inputs, **how, streamer=streamer)
    if not single:
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(*(f"=== {index} ===\n{text}" for index, text in enumerate(texts, start=1)), sep="\n")
    held = cache.memory() if args.cache["cache"] == "turboquant" else readable(held_bytes(cache))
    print(f"\n{type(cache).__name__} of {cache.get_seq_length():,} tokens: {held}")


if __name__ == "__main__":
    raise SystemExit(run(main))
