"""Compress a small convolutional network, and see which class depends on which layer.

    python examples/vision.py [REPORT.html]

The network and its pictures are made here, so seconds on one core, and nothing is fetched.
"""

import sys

import torch
from torch import Tensor, nn

import attar

SIDE = 16
SHAPES = ("disc", "square", "stripes", "cross")


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy grey pictures `count 1 16 16` of four shapes, and which shape each shows."""
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randint(len(SHAPES), (count,), generator=generator)
    middle = 5 + 6 * torch.rand(count, 2, 1, 1, generator=generator)
    place = torch.arange(SIDE).float()
    down, right = (place[:, None] - middle[:, 0]).abs(), (place[None] - middle[:, 1]).abs()
    drawn = torch.stack(
        [
            (down.square() + right.square() < 20).float(),
            (torch.maximum(down, right) < 4).float(),
            ((down + 0 * right) % 4 < 2).float(),
            (torch.minimum(down, right) < 1.5).float(),
        ],
        1,
    )
    chosen = drawn[torch.arange(count), answers][:, None]
    return chosen + 0.3 * torch.randn(chosen.shape, generator=generator), answers


def network() -> nn.Module:
    """Make the network, untrained: plain, depthwise and pointwise convolutions with their norms."""
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(48, len(SHAPES)),
    )  # fmt: skip


def train(module: nn.Module) -> nn.Module:
    """Train it for a few seconds."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for step in range(80):
        inputs, answers = pictures(32, seed=step)
        loss = nn.functional.cross_entropy(module(inputs), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


def main(page: str) -> None:
    """Say who depends on what, compress, and try the small network on new pictures."""
    torch.manual_seed(0)
    inputs, answers = pictures(160, seed=1000)
    model = attar.load(train(network()), examples={"inputs": inputs[:2]}, task="classify")

    labels = [SHAPES[answer] for answer in answers]
    scores = attar.explain(model, {"inputs": inputs, "shape": labels}, slices="shape")
    print("nats lost per prediction if a layer were removed, by what the picture shows")
    for name in scores["price"].totals:
        relevance = {label: scores.statistics.unit_relevance[label][name] for label in SHAPES}
        print(f"  {name:4}" + "".join(f"  {label} {r:.3f}" for label, r in relevance.items()))

    plan = attar.plan(model, scores, size="22%")
    for name, choice in plan.choices.items():
        print(f"  {name:4}  {choice.treatment} {dict(choice.settings)}")
    small = attar.apply(model, plan)
    found = attar.audit(model, small)
    print(f"{scores.session.bytes_at_16_bits:,} bytes in 16 bits, {plan.weight_bytes:,} after")
    print(f"{found.divergence.value:.4f} nats per prediction lost: {found.outcome}")

    fresh, shown = pictures(500, seed=2000)
    with torch.no_grad():
        for name, one in (("original", model), ("compressed", small)):
            right = (one.module(fresh).argmax(1) == shown).float().mean()
            print(f"{name}: {float(right):.1%} of new pictures named rightly")
    print(f"report: {found.report(page)}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "report.html")
