"""Compress a small language model: a two-layer Llama that reads bytes.

    python examples/language.py [FOLDER]

The model is made and trained a little here, on the documentation that Python ships, so seconds on
one core, and nothing is fetched. The compressed model is written to FOLDER (demo/language
where left out) and read back from there. Needs attar[language].
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import attar

LENGTH = 64  # bytes in one sequence


def sequences(count: int, seed: int) -> Tensor:
    """Cut pieces of text, as byte numbers, `count 64`."""
    text = torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8)
    starts = torch.randint(
        len(text) - LENGTH, (count, 1), generator=torch.Generator().manual_seed(seed)
    )
    return text[starts + torch.arange(LENGTH)].long()


def trained_llama() -> LlamaForCausalLM:
    """Make a Llama of 0.1 million parameters and train it for a few seconds."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    module = LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for step in range(100):
        tokens = sequences(16, seed=step)
        logits = module(tokens, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


def main(folder: Path) -> None:
    """Compress, read back, and compare."""
    torch.manual_seed(0)
    llama = trained_llama()
    tokens = sequences(40, seed=1000)
    model = attar.load(llama, examples=tokens[:2])
    report = attar.compress(model, size="3.2bits", data=tokens, out=folder, force=True)
    verdict = report.verdict
    print(f"{report.bytes_before:,} bytes in 16 bits, {report.bytes_after:,} written")
    for turn in report.plan.rounds:
        print(f"predicted {turn.predicted_damage:.4f}, measured {turn.measured_damage:.4f} nats")
    print(f"on other text: {verdict.divergence.value:.4f} nats per token, perplexity times")
    print(f"{verdict.perplexity_ratio.value:.3f}, {verdict.flips.value:.1%} changed predictions")

    small = attar.load(folder, factory=llama)
    for name, one in (("original", model), ("compressed", small)):
        torch.manual_seed(1)
        written = one.module.generate(tokens[:1, :24], max_new_tokens=30, do_sample=True)
        print(f"{name}: {bytes(written[0].tolist()).decode(errors='replace')!r}")
    print(f"report: {folder / 'report' / 'report.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo/language"))
