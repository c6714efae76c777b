"""Tiny random models with everything that `load_data` and `attar run` ask of a model."""

from functools import cache

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn

from attar.load.tasks import TASKS
from attar.records import Architecture, Model

PICTURE = {"size": 33, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.5], "crop_fraction": 0.875}
WORDS = ("Th", "In", "We")


def byte_tokenizer(*, begins: bool = False, sentence: bool = False, words=WORDS) -> bytes:
    """One token per byte, three more for openings, and special tokens at the end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(word[0], word[1]) for word in words]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    start, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    if begins or sentence:
        rule = "<s> $A </s>" if sentence else "<s> $A"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=rule, special_tokens=[("<s>", start), ("</s>", end)]
        )
    return tokenizer.to_str().encode()


def toy(task, module, files=None, config=None, examples=None) -> Model:
    return Model(
        module=module.eval().requires_grad_(requires_grad=False),
        task=TASKS[task],
        architecture=Architecture("factory", config or {}),
        name=f"toy {task}",
        origin="random",
        licence="none",
        files=files or {},
        examples=examples,
        source_bytes=0,
    )


@cache
def language_model(*, begins: bool = False) -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    files = {"tokenizer.json": byte_tokenizer(begins=begins)}
    examples = {"tokens": torch.arange(12).reshape(2, 6)}
    return toy("language", LlamaForCausalLM(config), files, examples=examples)


class Bag(nn.Module):
    """Mean of token vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.vectors = nn.Embedding(264, 7)

    def forward(self, tokens, attention):
        weights = attention[:, :, None].float()
        return (self.vectors(tokens) * weights).sum(1) / weights.sum(1)


def sentence_model() -> Model:
    tokens = torch.arange(12).reshape(2, 6)
    return toy(
        "embed",
        Bag(),
        {"tokenizer.json": byte_tokenizer(sentence=True)},
        examples={"tokens": tokens, "attention": torch.ones_like(tokens)},
    )


def picture_model(labels: bytes = b"") -> Model:
    torch.manual_seed(2)
    module = nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(5, 7),
    )  # fmt: skip
    files = {"labels.txt": labels} if labels else {}
    examples = {"pixels": torch.zeros(2, 3, 33, 33)}
    return toy("classify", module, files, {"picture": PICTURE}, examples)


def regression_model() -> Model:
    return toy("regress", nn.Linear(3, 2), examples={"inputs": torch.zeros(2, 3)})


@cache
def speech_model() -> Model:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["endoftext", "startoftranscript", "en", "de", "transcribe", "notimestamps"]
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>") for name in special])
    torch.manual_seed(3)
    config = WhisperConfig(
        vocab_size=264,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        num_mel_bins=80,
        pad_token_id=256,
        bos_token_id=256,
        eos_token_id=256,
        decoder_start_token_id=257,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    module = WhisperForConditionalGeneration(config)
    examples = {
        "features": torch.zeros(1, 80, 3000),
        "decoder_tokens": torch.tensor([[257, 258, 260, 261]]),
        "mask": torch.tensor([[False, False, False, True]]),
    }
    return toy("transcribe", module, {"tokenizer.json": tokenizer.to_str().encode()}, {}, examples)


def write_pictures(folder, n: int, *, seed: int = 0) -> None:
    """Random pictures of odd sizes, each a different one."""
    import numpy as np
    from PIL import Image

    draws = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n):
        shape = (41 + number, 57, 3)
        Image.fromarray(draws.integers(0, 256, shape, dtype=np.uint8)).save(
            folder / f"picture{number:02}.png"
        )


def numbered_text(n_paragraphs: int, *, seed: int = 0) -> str:
    """Paragraphs of which no two share much."""
    import random

    draws = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    paragraphs = []
    for number in range(n_paragraphs):
        words = ["".join(draws.choices(letters, k=draws.randint(2, 9))) for _ in range(30)]
        paragraphs.append(f"Paragraph {number} says {' '.join(words)}.")
    return "\n\n".join(paragraphs)
