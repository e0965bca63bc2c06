"""
Read a long text once, save its compressed cache, and ask about it, now or in other processes.

    python examples/long_document_qa.py
    python examples/long_document_qa.py --text report.txt --question "What was decided?"
    python examples/long_document_qa.py --text report.txt --save report
    python examples/long_document_qa.py --load report --question "What was decided?"
"""

import tempfile
import time
from pathlib import Path

import torch
from load_model import TEXT as LIGHTHOUSE
from load_model import load, parser

from hf_turboquant import TurboQuantCache
from hf_turboquant._supported import cache_name
from hf_turboquant.cli import run
from hf_turboquant.evaluation.load import read_text

QUESTIONS = ["Who was the first keeper?", "Where did the lens come from?", "What does the ticket cost?"]
TEXT, CACHE = "text.txt", "cache"


def encode(tokenizer, text: str, question: str) -> list[torch.Tensor]:
    """Token ids, each of shape `[1, tokens]`: the part that all questions share, and the rest."""
    content, rest, mark = f"{text}\n\nAnswer from this text in one sentence. ", "\n", "<question>"
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": content + mark}]
        content = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # The last one, because the text may contain the mark as well.
        content, rest = content.rsplit(mark, 1)
    # Tokenised separately, so that the shared tokens never depend on the question.
    pieces = content, question + rest
    return [tokenizer(piece, add_special_tokens=False, return_tensors="pt")["input_ids"] for piece in pieces]


@torch.no_grad()
def save(model, tokenizer, text: str, folder: Path) -> None:
    """Lets the model read the text, and writes the text and its cache to `folder`."""
    ids, _ = encode(tokenizer, text, "")
    cache, start = TurboQuantCache(model.config), time.perf_counter()
    model(ids.to(model.device), **{cache_name(model): cache}, logits_to_keep=1)
    folder.mkdir(parents=True, exist_ok=True)
    cache.save_pretrained(folder / CACHE)
    (folder / TEXT).write_text(text, encoding="utf-8")
    elapsed_s, full = time.perf_counter() - start, cache.memory().full_bytes
    stored = sum(path.stat().st_size for path in (folder / CACHE).iterdir())
    print(
        f"{ids.shape[1]:,} tokens read and saved in {elapsed_s:.1f} s: {stored:,} bytes on disk, a DynamicCache holds "
        f"{full:,} ({full / stored:.2f} times as many)"
    )


def answer(model, tokenizer, folder: Path, question: str, max_new_tokens: int) -> None:
    """Loads the cache, so that the model reads only the question, and prints the answer."""
    start = time.perf_counter()
    cache = TurboQuantCache.from_pretrained(folder / CACHE, config=model.config, device=model.device)
    loaded_s = time.perf_counter() - start
    shared, rest = encode(tokenizer, (folder / TEXT).read_text(encoding="utf-8"), question)
    ids = torch.cat([shared, rest], dim=1).to(model.device)
    options = {cache_name(model): cache, "max_new_tokens": max_new_tokens, "do_sample": False}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
    print(f"\n{question}\n{tokenizer.decode(output, skip_special_tokens=True).strip()}")
    print(f"({shared.shape[1]:,} tokens loaded in {loaded_s:.2f} s, {rest.shape[1]} read)")


def main():
    about = "Read a text once, save its compressed cache, ask about it, now or later."
    arguments = parser(f"{about} With no arguments: all of that with a short text, in a temporary folder.")
    arguments.add_argument("--text", default=str(LIGHTHOUSE), help="the text file to read")
    place = arguments.add_mutually_exclusive_group()
    place.add_argument("--save", type=Path, metavar="DIR", help="folder to save its cache to")
    place.add_argument("--load", type=Path, metavar="DIR", help="folder of a saved cache to ask about")
    arguments.add_argument("--question", action="append", help="may be given several times; with --save none is needed")
    arguments.add_argument("--max-new-tokens", type=int, default=48, help="most tokens of an answer")
    args = arguments.parse_args()
    if args.load and not (args.load / CACHE).is_dir():
        arguments.error(f"--load must be a folder that --save wrote, got {args.load}")
    text = None if args.load else read_text(args.text)

    model, tokenizer = load(args.model)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.load or args.save or Path(temporary)
        if text is not None:
            save(model, tokenizer, text, folder)
        for question in args.question or (() if args.save else QUESTIONS):
            answer(model, tokenizer, folder, question, args.max_new_tokens)


if __name__ == "__main__":
    raise SystemExit(run(main))
