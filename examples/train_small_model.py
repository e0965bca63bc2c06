"""
Train a small Qwen3-style model of bytes, as a second model to measure quality on, with head_dim 128 and normalised
queries and keys.

    python examples/train_small_model.py small-qwen3 --text wikitext-2-valid.txt --minutes 1
    hf-turboquant evaluate small-qwen3 --text wikitext-2-valid.txt --parts quality

It learns from the sources of Python's standard library and from `--text` without its first 200,000 characters, which
are kept for measuring. A minute on an H100 is enough; a CPU takes hours.
"""

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
from transformers import ByT5Tokenizer, Qwen3Config, Qwen3ForCausalLM

from hf_turboquant.cli import Formatter, run

HELD_OUT = 200_000
# Sequences of 1,024 bytes in a step.
BATCH = 32
# Folders of the standard library not to learn from: other packages, and pydoc_data, which is kept for measuring.
SKIPPED = {"site-packages", "dist-packages", "pydoc_data"}


def training_bytes(text: Path | None) -> torch.Tensor:
    """The training text as token ids of ByT5's tokenizer: byte + 3."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(library.rglob("*.py")) if not SKIPPED & set(path.parts)]
    parts = [path.read_bytes() for path in files]
    if text is not None:
        # Twice, because there is little of it.
        parts += 2 * [text.read_text(encoding="utf-8")[HELD_OUT:].encode()]
    return torch.frombuffer(bytearray(b"\n".join(parts)), dtype=torch.uint8).long() + 3


def new_model() -> Qwen3ForCausalLM:
    """A new model of six million parameters."""
    config = Qwen3Config(
        vocab_size=384, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=32_768, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            # Trained models have uneven channels, which a minute of training does not produce. Both channels of a
            # rotary pair share a gain, so that gains of queries and keys cancel at any distance.
            gains = torch.randn(64).exp().repeat(2)
            layer.self_attn.k_norm.weight.mul_(gains)
            layer.self_attn.q_norm.weight.div_(gains)
    return model


def main():
    about = "Train a small model of bytes with head_dim 128 and q/k norm."
    parser = argparse.ArgumentParser(description=about, formatter_class=Formatter)
    parser.add_argument("folder", type=Path, help="folder to save the model to")
    parser.add_argument("--text", type=Path, help="a text to learn from in addition to Python's library")
    parser.add_argument("--minutes", type=float, default=1.0, help="time to train")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = training_bytes(args.text).to(device)
    model = new_model().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    offsets = torch.arange(1024, device=device)
    generator = torch.Generator(device).manual_seed(0)
    start, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - start) / (60 * args.minutes)) < 1:
        # Warm up, then follow a cosine that ends when the time is up.
        factor = min(1, step / 100, 0.02 + math.cos(math.pi / 2 * done) ** 2)
        optimizer.param_groups[0]["lr"] = 2e-3 * factor
        ids = data[torch.randint(len(data) - 1024, (BATCH, 1), device=device, generator=generator) + offsets]
        with torch.autocast(device, torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            print(f"step {step}, {len(data):,} bytes, loss {loss.item():.3f} nats a byte", flush=True)
        step += 1
    print(f"{step} steps, {step * BATCH * 1024:,} bytes seen, last loss {loss.item():.3f}")
    # Two bytes per weight keep the files small.
    model.eval().to(torch.bfloat16).save_pretrained(args.folder)
    ByT5Tokenizer().save_pretrained(args.folder)


if __name__ == "__main__":
    raise SystemExit(run(main))
