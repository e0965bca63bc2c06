"""
Generate text through the cache of your choice, with the arguments of transformers' script of this name.

    python examples/run_generation.py
    python examples/run_generation.py --cache turboquant --nbits 3 --prompt "Once upon a time" --temperature 0.7
    python examples/run_generation.py --model_name_or_path Qwen/Qwen3-0.6B --prompt_file report.txt --question "Why?"
"""

import argparse

from load_model import QUESTION, TEXT, encode, load
from transformers import DynamicCache, TextStreamer, set_seed

from hf_turboquant import TurboQuantCache, TurboQuantConfig
from hf_turboquant._supported import cache_name
from hf_turboquant.cli import Formatter, number, run
from hf_turboquant.config import KEY_ESTIMATORS
from hf_turboquant.evaluation.load import read_text


def parse_args():
    about = "Cache options not given are TurboQuantCache's own."
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
    add("--cache", choices=("turboquant", "dynamic"), default="turboquant", help="which cache")
    # No defaults here, because the package has those of the cache.
    options = parser.add_argument_group("turboquant", argument_default=argparse.SUPPRESS)
    names = [
        options.add_argument("--nbits", type=number, help="bits per coordinate of keys and values"),
        options.add_argument("--key_bits", type=int, help="for keys, in place of --nbits"),
        options.add_argument("--value_bits", type=int, help="for values, in place of --nbits"),
        options.add_argument("--key_estimator", choices=KEY_ESTIMATORS, help="how keys are stored"),
        options.add_argument("--residual_length", type=int, help="tokens in the exact recent window"),
    ]
    args = parser.parse_args()
    args.options = {name.dest: vars(args)[name.dest] for name in names if name.dest in args}
    if args.options and args.cache == "dynamic":
        parser.error(f"--{next(iter(args.options))} belongs to --cache turboquant")
    if args.num_return_sequences > args.num_beams and not args.temperature:
        parser.error("--num_return_sequences needs as many --num_beams, or a --temperature above 0")
    return args


def main():
    args = parse_args()
    TurboQuantConfig(**args.options)
    prompt, question = args.prompt, args.question
    if prompt is None:
        prompt = read_text(args.prompt_file or str(TEXT))
        question = question or (None if args.prompt_file else QUESTION)
    if question:
        prompt = f"{prompt}\n\n{question}"

    set_seed(args.seed)
    model, tokenizer = load(args.model_name_or_path, "float16" if args.fp16 else None, "cpu" if args.use_cpu else None)
    inputs = encode(tokenizer, prompt).to(model.device)
    ours = args.cache == "turboquant"
    cache = TurboQuantCache(model.config, **args.options) if ours else DynamicCache(config=model.config)
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
    held = f": {cache.memory()}" if ours else ""
    print(f"\n{type(cache).__name__} of {cache.get_seq_length():,} tokens{held}")


if __name__ == "__main__":
    raise SystemExit(run(main))
