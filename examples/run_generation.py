"""
Generate text through the cache of your choice, with the arguments of transformers' script of this name.

    python examples/run_generation.py
    python examples/run_generation.py --cache turboquant --nbits 3 --prompt "Once upon a time" --temperature 0.7
    python examples/run_generation.py --model_name_or_path Qwen/Qwen3-0.6B --prompt_file report.txt --question "Why?"
"""

import argparse
from pathlib import Path

import torch
from load_model import TEXT, encode, load
from transformers import DynamicCache, TextStreamer, set_seed

from hf_turboquant import TurboQuantCache
from hf_turboquant._supported import cache_name

QUESTION = "Write a short article about the lighthouse for the visitors of the museum."
CACHE_OPTIONS = ("nbits", "key_bits", "value_bits", "key_estimator", "residual_length")


def parse_args():
    parser = argparse.ArgumentParser(description="Cache options not given are TurboQuantCache's own.")
    parser.add_argument("--model_name_or_path", help="a Hub name or a local folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--prompt", help="default: a text about a lighthouse, and a question about it")
    parser.add_argument("--prompt_file", type=Path, help="a text file to use as the prompt")
    parser.add_argument("--question", help="asked below the prompt")
    parser.add_argument("--length", type=int, default=128, help="new tokens at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--k", type=int, default=50, help="sample from this many most likely tokens")
    parser.add_argument("--p", type=float, default=0.9, help="sample from this probability mass")
    parser.add_argument("--num_beams", type=int, default=1)
    parser.add_argument("--num_return_sequences", type=int, default=1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--fp16", action="store_true")
    parser.add_argument("--cache", choices=("turboquant", "dynamic"), default="turboquant")
    # No defaults here, because the package has those of the cache.
    cache = parser.add_argument_group("turboquant", argument_default=argparse.SUPPRESS)
    cache.add_argument("--nbits", type=float, help="bits per coordinate of keys and values")
    cache.add_argument("--key_bits", type=int, help="for keys, in place of --nbits")
    cache.add_argument("--value_bits", type=int, help="for values, in place of --nbits")
    cache.add_argument("--key_estimator", choices=("qjl", "rescaled", "mse"))
    cache.add_argument("--residual_length", type=int, help="tokens in the exact recent window")
    args = parser.parse_args()
    if args.prompt and args.prompt_file:
        parser.error("give --prompt or --prompt_file, not both")
    args.options = {name: value for name, value in vars(args).items() if name in CACHE_OPTIONS}
    if args.options and args.cache == "dynamic":
        parser.error(f"--{next(iter(args.options))} belongs to --cache turboquant")
    return args


def main():
    args = parse_args()
    prompt, question = args.prompt, args.question
    if args.prompt_file:
        prompt = args.prompt_file.read_text(encoding="utf-8")
    elif prompt is None:
        prompt, question = TEXT.read_text(encoding="utf-8"), question or QUESTION
    if question:
        prompt = f"{prompt}\n\n{question}"

    set_seed(args.seed)
    dtype = torch.float16 if args.fp16 else None
    model, tokenizer = load(args.model_name_or_path, dtype, "cpu" if args.use_cpu else None)
    inputs = encode(tokenizer, prompt).to(model.device)
    if args.cache == "turboquant":
        cache = TurboQuantCache(model.config, **args.options)
    else:
        cache = DynamicCache(config=model.config)
    sampling = {"do_sample": False}
    if args.temperature:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.k, "top_p": args.p}
    single = args.num_return_sequences == args.num_beams == 1
    output = model.generate(
        **inputs,
        **sampling,
        **{cache_name(model): cache},
        max_new_tokens=args.length,
        repetition_penalty=args.repetition_penalty,
        num_beams=args.num_beams,
        num_return_sequences=args.num_return_sequences,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if single else None,
    )
    if not single:
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in enumerate(texts, start=1):
            print(f"=== {index} ===\n{text}")
    held = f": {cache.memory()}" if args.cache == "turboquant" else ""
    print(f"\n{type(cache).__name__} of {cache.get_seq_length():,} tokens{held}")


if __name__ == "__main__":
    main()
