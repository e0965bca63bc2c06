"""
Chat with a model: one compressed cache holds the whole conversation, so that the model reads only new tokens.

    python examples/chat.py
    python examples/chat.py --model Qwen/Qwen3-0.6B --nbits 3

An empty line or the end of the input ends the chat; Ctrl-C stops an answer.
"""

import torch
from load_model import load, parser
from transformers import TextStreamer

from hf_turboquant import TurboQuantCache, TurboQuantConfig
from hf_turboquant._supported import cache_name
from hf_turboquant.cli import run


def common_length(first: torch.Tensor, second: torch.Tensor) -> int:
    """The number of leading tokens that two sequences, each of shape `[tokens]`, have in common."""
    length = min(len(first), len(second))
    return int((first[:length] == second[:length]).long().cumprod(0).sum())


def reply(model, tokenizer, messages: list[dict], cache, seen: torch.Tensor, max_new_tokens: int):
    """
    Lets the model answer the last message; `seen`, of shape `[tokens]`, are the tokens in the cache.

    Returns:
        All tokens so far, of shape `[tokens]`, and the answer.
    """
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = inputs.to(model.device)
    # The chat template may write an answer a little differently: remove the tokens that differ.
    kept = common_length(seen, inputs["input_ids"][0])
    if cache.get_seq_length() > kept:
        cache.crop(kept - cache.get_seq_length())
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    how = {cache_name(model): cache, "max_new_tokens": max_new_tokens, "do_sample": False, "streamer": streamer}
    output = model.generate(**inputs, **how)[0]
    return output, tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def chat(model, tokenizer, cache, max_new_tokens: int) -> None:
    """Answers one line after another."""
    messages, seen = [], torch.empty(0, dtype=torch.long, device=model.device)
    while text := input("\nyou> ").strip():
        messages.append({"role": "user", "content": text})
        before = len(seen)
        try:
            seen, answer = reply(model, tokenizer, messages, cache, seen, max_new_tokens)
        except KeyboardInterrupt:
            # It may have come in the middle of a step.
            cache.reset()
            messages, seen = messages[:-1], seen[:0]
            print("\n[stopped: ask again to go on from before this question; an empty line ends the chat]")
            continue
        messages.append({"role": "assistant", "content": answer})
        print(f"[{len(seen) - before} tokens more; {cache.memory()}]")


def main():
    arguments = parser("Chat through a compressed KV cache.")
    arguments.add_argument("--nbits", type=float, default=4, help="bits per coordinate of keys and values")
    arguments.add_argument("--max-new-tokens", type=int, default=256, help="most tokens of an answer")
    args = arguments.parse_args()
    TurboQuantConfig(nbits=args.nbits)
    model, tokenizer = load(args.model)
    if not tokenizer.chat_template:
        arguments.error("--model must be one that chats: its tokenizer has no chat template")
    try:
        chat(model, tokenizer, TurboQuantCache(model.config, nbits=args.nbits), args.max_new_tokens)
    except (EOFError, KeyboardInterrupt):
        print("\nThe chat is over; the same command begins another.")


if __name__ == "__main__":
    raise SystemExit(run(main))
