"""Compress a small network of one's own: explain, plan, apply, audit; then all of it in one call.

    python examples/mlp.py [FOLDER]

The network is made and trained here, so seconds on one core, and nothing is fetched. The model is
written to FOLDER (demo/mlp where left out).
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import attar

FEATURES, CLASSES = 16, 6


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points, and a class drawn for each: the nearer one of six fixed points, the likelier."""
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=generator)
    chances = (-torch.cdist(inputs, centres).square() / 4).softmax(1)
    return inputs, torch.multinomial(chances, 1, generator=generator)[:, 0]


def network() -> nn.Module:
    """Make a network of three layers, untrained."""
    return nn.Sequential(
        nn.Linear(FEATURES, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES)
    )


def train(module: nn.Module) -> nn.Module:
    """Train it for a second."""
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for step in range(200):
        inputs, answers = samples(128, seed=1 + step)
        loss = nn.functional.cross_entropy(module(inputs), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


def main(folder: Path) -> None:
    """Go through the verbs one by one, then write the model and read it back."""
    torch.manual_seed(0)
    inputs, _ = samples(300, seed=1000)
    model = attar.load(train(network()), examples={"inputs": inputs[:2]}, task="classify")

    scores = attar.explain(model, inputs)
    for name, nats in scores["price"].totals.items():
        print(f"layer {name}: {nats:.3f} nats lost per prediction if its output were zero")

    plan = attar.plan(model, scores, size="10kB", keep=["4"])
    for name, choice in plan.choices.items():
        print(f"layer {name}: {choice.treatment} {dict(choice.settings)}")

    small = attar.apply(model, plan)
    found = attar.audit(model, small)
    print(f"{plan.weight_bytes:,} bytes; {found.divergence.value:.4f} nats per prediction lost,")
    print(f"{found.flips.value:.1%} of the predictions changed: {found.outcome}")

    report = attar.compress(model, size="10kB", keep=["4"], data=inputs, out=folder, force=True)
    back = attar.load(folder, factory=network())
    with torch.no_grad():
        same = torch.equal(back.module(inputs), small.module(inputs))
    print(f"written, {report.bytes_after:,} bytes; read back, same answers as in memory: {same}")
    print(f"report: {folder / 'report' / 'report.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo/mlp"))
