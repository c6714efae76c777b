"""Small networks that were really trained, and faults to plant in copies, for `audit.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, WIDTH, DEPTH = 10, 32, 18
SPREAD = 0.9  # of a class about its centre, whose numbers have a spread of one
LANGUAGES, WORDS, SHARED, LENGTH = 5, 24, 8, 32
HIDDEN, HEADS, LAYERS = 48, 4, 3
STEPS, BATCH, RATE = 300, 64, 3e-3


@dataclass(frozen=True)
class Trained:
    """A network with data it was not trained on.

    Attributes:
        arrays: Named inputs, `labels` of samples, and true `answers` where there are any.
        units: Names of the weights that a plant may spoil.
    """

    module: nn.Module
    task: str
    arrays: dict[str, np.ndarray]
    units: tuple[str, ...]


@dataclass(frozen=True)
class Plant:
    """A copy with one fault, and what the report should name first.

    Attributes:
        culprit: A layer's name, a label, or "tokenizer".
        where: The head or rows in the layer, or "".
        numbers: Of the words of a language model, in its tokenizer.
    """

    module: nn.Module
    culprit: str
    where: str = ""
    numbers: tuple[int, ...] = tuple(range(SHARED + LANGUAGES * WORDS))


class Residual(nn.Module):
    """Twenty linear maps: one in, eighteen with a shortcut around each, one out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.maps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of the classes."""
        x = self.first(inputs)
        for one in self.maps:
            x = x + 0.5 * torch.relu(one(x))
        logits: Tensor = self.last(x / DEPTH)
        return logits


class Block(nn.Module):
    """Attention over what came before, and a gated map."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = HIDDEN // HEADS
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4)
        )
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the block finds."""
        h = self.norm1(x)
        q, k, v = (
            one(h).view(*h.shape[:2], HEADS, self.head_dim).transpose(1, 2)
            for one in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(x.shape))
        added: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return added


class Speaker(nn.Module):
    """A language model of a few words in each of five languages."""

    def __init__(self) -> None:
        super().__init__()
        words = SHARED + LANGUAGES * WORDS
        self.embed = nn.Embedding(words, HIDDEN)
        self.places = nn.Parameter(0.1 * torch.randn(LENGTH, HIDDEN))
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token that follows each."""
        # What is written beyond the length that was trained begins from the first place again.
        x = self.embed(tokens) + self.places[torch.arange(tokens.shape[1]) % LENGTH]
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def train(module: nn.Module, draw: Callable[[], tuple[Tensor, Tensor]]) -> nn.Module:
    """Fit a module to samples that are drawn anew for each step."""
    optimiser = torch.optim.Adam(module.parameters(), lr=RATE)
    for _ in range(STEPS):
        inputs, targets = draw()
        loss = F.cross_entropy(module(inputs).flatten(0, -2), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return module.eval().requires_grad_(False)


def classifier(seed: int, samples: int) -> Trained:
    """Train on clouds of points, one for each class."""
    torch.manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH)

    def draw(count: int = BATCH) -> tuple[Tensor, Tensor]:
        answers = torch.randint(0, CLASSES, (count,))
        return centres[answers] + SPREAD * torch.randn(count, WIDTH), answers

    module = train(Residual(), draw)
    inputs, answers = draw(samples)
    arrays = {"inputs": inputs.numpy(), "answers": answers.numpy(), "labels": answers.numpy()}
    names = [n.removesuffix(".weight") for n, p in module.named_parameters() if p.dim() == 2]
    return Trained(module, "classify", arrays, tuple(names))


def speaker(seed: int, samples: int) -> Trained:
    """Train on sentences of five languages, each with words and an order of its own."""
    torch.manual_seed(seed)
    words = SHARED + LANGUAGES * WORDS
    follow = torch.full((LANGUAGES, words, words), -torch.inf)
    for language in range(LANGUAGES):
        own = torch.cat([torch.arange(SHARED), SHARED + WORDS * language + torch.arange(WORDS)])
        follow[language][own[:, None], own] = 2.0 * torch.randn(len(own), len(own))
    chances = follow.softmax(-1).nan_to_num(1 / words)

    def draw(count: int = BATCH, language: Tensor | None = None) -> tuple[Tensor, Tensor]:
        spoken = torch.randint(0, LANGUAGES, (count,)) if language is None else language
        tokens = SHARED + WORDS * spoken[:, None] + torch.randint(0, WORDS, (count, 1))
        for _ in range(LENGTH):
            following = torch.multinomial(chances[spoken, tokens[:, -1]], 1)
            tokens = torch.cat([tokens, following], 1)
        return tokens[:, :-1], tokens[:, 1:]

    module = train(Speaker(), draw)
    spoken = torch.arange(samples) % LANGUAGES
    tokens, _ = draw(samples, spoken)
    arrays = {"tokens": tokens.numpy(), "labels": np.array([f"language {n}" for n in spoken])}
    names = [f"layers.{n}.o_proj" for n in range(LAYERS)]
    return Trained(module, "language", arrays, tuple(names))


# ---------------------------------------------------------------------------------------------
# faults


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Round to nearest, one step for each row: what a careless tool does."""
    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (weight / step).round() * step


def everywhere_rounded(trained: Trained, bits: int) -> nn.Module:
    """A copy with every matrix in so many bits."""
    module = deepcopy(trained.module)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 2 and name != "places":
            parameter.data = rounded(parameter.data, bits)
    return module


def bad_layer(trained: Trained, draws: np.random.Generator) -> Plant:
    """One layer in 3 bits, all others in 8."""
    module = everywhere_rounded(trained, 8)
    name = str(draws.choice(trained.units))
    weight = module.get_parameter(f"{name}.weight")
    weight.data = rounded(trained.module.get_parameter(f"{name}.weight").data, 3)
    return Plant(module, name)


def damaged_class(trained: Trained, draws: np.random.Generator) -> Plant:
    """All in 8 bits, and what tells one class from others is a third weaker."""
    module = everywhere_rounded(trained, 8)
    label = int(draws.integers(CLASSES))
    module.get_parameter("last.weight").data[label] *= 2 / 3
    return Plant(module, f"class {label}")


def damaged_language(trained: Trained, draws: np.random.Generator) -> Plant:
    """All in 8 bits, and the words of one language in 3."""
    module = everywhere_rounded(trained, 8)
    language = int(draws.integers(LANGUAGES))
    rows = slice(SHARED + WORDS * language, SHARED + WORDS * (language + 1))
    table = module.get_parameter("embed.weight")
    table.data[rows] = rounded(trained.module.get_parameter("embed.weight").data[rows], 3)
    return Plant(module, f"language {language}")


def removed_head(trained: Trained, draws: np.random.Generator) -> Plant:
    """All in 8 bits, and one head's output thrown away."""
    module = everywhere_rounded(trained, 8)
    name, head = str(draws.choice(trained.units)), int(draws.integers(HEADS))
    side = HIDDEN // HEADS
    module.get_parameter(f"{name}.weight").data[:, side * head : side * (head + 1)] = 0
    return Plant(module, name, f"head {head}")


def truncated_embedding(trained: Trained, draws: np.random.Generator) -> Plant:
    """All in 8 bits, and the last rows of the table are gone."""
    module = everywhere_rounded(trained, 8)
    words = len(module.get_parameter("embed.weight"))
    first = words - int(draws.integers(4, WORDS))
    module.get_parameter("embed.weight").data[first:] = 0
    return Plant(module, "embed", f"rows {first} to {words - 1}")


def shuffled_tokenizer(trained: Trained, draws: np.random.Generator) -> Plant:
    """All in 8 bits, and words have other numbers in the tokenizer than in the table."""
    module = everywhere_rounded(trained, 8)
    order = draws.permutation(SHARED + LANGUAGES * WORDS)
    return Plant(module, "tokenizer", numbers=tuple(int(number) for number in order))


def tokenizer(numbers: tuple[int, ...]) -> bytes:
    """A tokenizer.json of words apart by spaces."""
    words = {f"w{word}": number for word, number in enumerate(numbers)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    parts: dict[str, Any] = {
        "normalizer": None,
        "post_processor": None,
        "decoder": None,
        "added_tokens": [],
    }
    split = {"type": "WhitespaceSplit"}
    return json.dumps({**parts, "version": "1.0", "pre_tokenizer": split, "model": model}).encode()


def untouched(trained: Trained, draws: np.random.Generator) -> Plant:
    """A copy whose numbers differ in the last of float32's bits, so that there is something."""
    module = deepcopy(trained.module)
    for parameter in module.parameters():
        noise = torch.from_numpy(draws.standard_normal(parameter.shape)).float()
        parameter.data *= 1 + 2.0**-20 * noise
    return Plant(module, "")


def unevenly_rounded(trained: Trained, draws: np.random.Generator) -> nn.Module:
    """A copy with every matrix in its own number of bits, from 3 to 8."""
    module = deepcopy(trained.module)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 2 and name != "places":
            parameter.data = rounded(parameter.data, int(draws.integers(3, 9)))
    return module
