"""What `attar run DIR` does: continue a text, classify pictures, embed texts, transcribe sound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from attar.decode import language_step, transcribe_windows, write_tokens
from attar.errors import DataError, ModelError, SettingError
from attar.inputs import (
    leading_tokens,
    open_picture,
    picture_settings,
    picture_to_pixels,
    read_tokenizer,
    sound_to_windows,
    special_tokens,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from attar.records import Batch, Model

LONGEST_TEXT = 512  # tokens a sentence encoder reads


def continue_text(
    model: Model, prompt: str, *, max_tokens: int, seed: int, temperature: float = 0.0
) -> str:
    """Write on after a prompt until an end token or `max_tokens`.

    Args:
        model: A language model with a tokenizer.
        prompt: Plain text; no chat template is put around it. May be empty.
        max_tokens: At most this many new tokens, >= 1.
        seed: Of the draws where `temperature` > 0.
        temperature: 0 takes the most likely token each time; 1 draws as the model says.

    Returns:
        The continuation alone.

    Raises:
        ModelError: Not a language model, or without a tokenizer.
        SettingError: A number outside its range.
    """
    _check_task(model, "language")
    if max_tokens < 1 or temperature < 0:
        raise SettingError(
            f"max_tokens is {max_tokens} and temperature {temperature}.",
            hint="give max_tokens 1 or more and temperature 0 or more",
        )
    tokenizer = read_tokenizer(model.files)
    ids = prompt_tokens(tokenizer, prompt)
    if not ids:
        raise DataError("the prompt is empty.", hint="give a word to begin with")
    ends = end_tokens(model, tokenizer)
    draws = torch.Generator().manual_seed(seed)
    writing = write_tokens(language_step(model), torch.tensor([ids]))
    logits = next(writing)
    written: list[int] = []
    while len(written) < max_tokens:
        chosen = _choose(logits[:, : tokenizer.get_vocab_size()], temperature, draws)
        if int(chosen) in ends:
            break
        written.append(int(chosen))
        if len(written) < max_tokens:
            logits = writing.send(chosen)
    # decoded together with the prompt, so that a space at the seam is kept
    whole, before = tokenizer.decode(ids + written), tokenizer.decode(ids)
    return whole.removeprefix(before)


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """What a language model reads of a prompt."""
    return leading_tokens(tokenizer) + tokenizer.encode(prompt, add_special_tokens=False).ids


def _choose(logits: Float[Tensor, "1 width"], temperature: float, draws: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=1)
    return torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=draws)[:, 0]


def end_tokens(model: Model, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end a text: those the module's config names, otherwise every special token."""
    config: Any = getattr(model.module, "config", None)
    named = getattr(config, "eos_token_id", None)
    if isinstance(named, int):
        return frozenset({named})
    if isinstance(named, list | tuple) and named:
        return frozenset(named)
    return special_tokens(tokenizer)


def classify_pictures(
    model: Model, files: Sequence[Path], top: int = 5
) -> list[tuple[Path, list[tuple[str, float]]]]:
    """Most likely classes of each picture with their probabilities, most likely first.

    Raises:
        DataError: A file that is no picture.
        ModelError: Not a classifier of pictures.
    """
    _check_task(model, "classify")
    settings = picture_settings(model.architecture.config)
    found = []
    for file in files:
        pixels = picture_to_pixels(open_picture(file), settings)
        with torch.no_grad():
            logits = model.task.forward(model.module, {"pixels": pixels[None]})[0, 0]
        chances = logits.float().softmax(dim=0)
        best = chances.topk(min(top, len(chances)))
        names = class_names(model.files, len(chances))
        ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found.append((file, [(names[index], chance) for index, chance in ranked]))
    return found


def class_names(files: Mapping[str, bytes], n_classes: int) -> list[str]:
    """Lines of labels.txt; "class 17" where the file is missing or has another length."""
    lines = files.get("labels.txt", b"").decode("utf-8", errors="replace").splitlines()
    if len(lines) == n_classes:
        return lines
    return [f"class {index}" for index in range(n_classes)]


def embed_texts(model: Model, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
    """One vector per text; longer texts are cut at 512 tokens.

    Raises:
        ModelError: Not a sentence encoder.
    """
    _check_task(model, "embed")
    tokenizer = read_tokenizer(model.files)
    vectors = []
    for text in texts:
        batch = sentence_batch(tokenizer, text)
        with torch.no_grad():
            vectors.append(model.task.forward(model.module, batch)[0, 0])
    if not vectors:
        raise DataError("there is no text to embed.", hint="give one text or more")
    return torch.stack(vectors)


def sentence_batch(tokenizer: Tokenizer, text: str) -> Batch:
    """What a sentence encoder reads of one text: its first tokens, and the one that ends it."""
    ids = tokenizer.encode(text).ids
    if len(ids) > LONGEST_TEXT:
        ids = [*ids[: LONGEST_TEXT - 1], ids[-1]]
    tokens = torch.tensor([ids], dtype=torch.int64)
    return {"tokens": tokens, "attention": torch.ones_like(tokens)}


def transcribe(
    model: Model, file: Path, features: Callable[[Tensor], Tensor], *, max_tokens: int = 224
) -> str:
    """Text spoken in a sound file of any length, window by window of 30 seconds.

    Args:
        model: Whisper.
        file: .wav, .flac or what else soundfile reads.
        features: Samples at 16 kHz to `mels frames`: `load.whisper.log_mel`.
        max_tokens: Per window.

    Raises:
        DataError: A file that is no sound.
        ModelError: Not a speech model.
    """
    _check_task(model, "transcribe")
    tokenizer = read_tokenizer(model.files)
    parts = []
    for window in sound_to_windows(file):
        heard = features(window)[None]
        _, texts = transcribe_windows(model, tokenizer, heard, max_tokens=max_tokens)
        parts.append(tokenizer.decode(texts[0]).strip())
    return " ".join(part for part in parts if part)


def _check_task(model: Model, task: str) -> None:
    if model.task.name != task:
        raise ModelError(
            f"{model.name} is a {model.task.name} model; the task asked for is {task}.",
            hint="attar models lists built-in models with their tasks",
        )
