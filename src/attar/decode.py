"""Let a model write token after token, with the key-value cache where its module has one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Container, Generator
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from attar.errors import ModelError
from attar.inputs import special_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import nn

    from attar.records import Model

Step: TypeAlias = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""New tokens `rows tokens` and a cache (None at first) to logits `rows width` and the new cache."""

END = "<|endoftext|>"
LANGUAGE_TOKEN = re.compile(r"<\|[a-z]{2,3}\|>")
LONGEST_TRANSCRIPT = 224  # tokens for 30 seconds: half of Whisper's 448 positions


def language_step(model: Model) -> Step:
    """Step of a language model; without a cache in the module, everything is read again."""
    if "past_key_values" not in inspect.signature(model.module.forward).parameters:
        return _rereading_step(model)

    def step(new: Tensor, cache: Any) -> tuple[Tensor, Any]:
        found = model.module(input_ids=new, past_key_values=cache, use_cache=True)
        return found.logits[:, -1], found.past_key_values

    return step


def _rereading_step(model: Model) -> Step:
    def step(new: Tensor, cache: Any) -> tuple[Tensor, Any]:
        tokens = new if cache is None else torch.cat([cache, new], dim=1)
        return model.task.forward(model.module, {"tokens": tokens})[:, -1], tokens

    return step


def speech_step(module: nn.Module, features: Float[Tensor, "rows mels frames"]) -> Step:
    """Step of a Whisper module that has heard `features`."""
    whisper: Any = module
    with torch.inference_mode():
        heard = whisper.get_encoder()(features)

    def step(new: Tensor, cache: Any) -> tuple[Tensor, Any]:
        found = whisper(
            encoder_outputs=heard, decoder_input_ids=new, past_key_values=cache, use_cache=True
        )
        return found.logits[:, -1], found.past_key_values

    return step


def write_tokens(
    step: Step, starts: Int64[Tensor, "rows tokens"]
) -> Generator[Float[Tensor, "rows width"], Int64[Tensor, " rows"], None]:
    """Yield the logits of the next token of each row; send the tokens that were chosen."""
    new, cache = starts, None
    while True:
        with torch.inference_mode():
            logits, cache = step(new, cache)
        new = (yield logits.float())[:, None]


def continue_greedily(
    step: Step,
    starts: Int64[Tensor, "rows tokens"],
    *,
    most_tokens: int,
    ends: Container[int],
    n_known: int,
) -> list[list[int]]:
    """Write the likeliest token each time, until an end token or `most_tokens`.

    Args:
        ends: Tokens that end a text.
        n_known: Outputs that stand for a token; those after it are padding.

    Returns:
        New tokens of each row; an end token is the last of its row.
    """
    writing = write_tokens(step, starts)
    logits = next(writing)
    texts: list[list[int]] = [[] for _ in starts]
    going = list(range(len(texts)))
    for number in range(most_tokens):
        chosen = logits[:, :n_known].argmax(dim=1)
        for row in going:
            texts[row].append(int(chosen[row]))
        going = [row for row in going if texts[row][-1] not in ends]
        if not going or number == most_tokens - 1:
            break
        logits = writing.send(chosen)
    return texts


def speech_prompts(
    tokenizer: Tokenizer, step: Step, rows: int
) -> tuple[Int64[Tensor, "rows 4"], int]:
    """Whisper's four opening tokens for each row, with the language it hears, and its end token.

    Raises:
        ModelError: The tokenizer lacks Whisper's special tokens.
    """
    start, transcribe, without_times, end = (
        _token_named(tokenizer, name)
        for name in ("<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>", END)
    )
    languages = torch.tensor(
        sorted(
            number
            for number in special_tokens(tokenizer)
            if LANGUAGE_TOKEN.fullmatch(tokenizer.id_to_token(number) or "")
        )
    )
    opening = torch.full((rows, 1), start)
    with torch.inference_mode():
        logits, _ = step(opening, None)
    heard = languages[logits[:, languages].argmax(dim=1)]
    rest = torch.tensor([[transcribe, without_times]]).expand(rows, 2)
    return torch.cat([opening, heard[:, None], rest], dim=1), end


def _token_named(tokenizer: Tokenizer, name: str) -> int:
    number = tokenizer.token_to_id(name)
    if number is None:
        raise ModelError(
            f"the tokenizer has no {name}, so it is not Whisper's.",
            hint="use the tokenizer.json of the Whisper model",
        )
    return number


def transcribe_windows(
    model: Model,
    tokenizer: Tokenizer,
    features: Float[Tensor, "rows mels frames"],
    *,
    max_tokens: int = LONGEST_TRANSCRIPT,
) -> tuple[Int64[Tensor, "rows 4"], list[list[int]]]:
    """Greedy transcription of windows of 30 seconds.

    Returns:
        prompts: The opening tokens of each row.
        texts: Token numbers after the opening, without the end token and special tokens.
    """
    step = speech_step(model.module, features)
    prompts, end = speech_prompts(tokenizer, step, len(features))
    config = model.architecture.config
    silent = sorted((special_tokens(tokenizer) - {end}) | {*config.get("suppress_tokens", ())})
    at_first = [*silent, *config.get("begin_suppress_tokens", ())]
    writing = write_tokens(step, prompts)
    logits = next(writing)
    texts: list[list[int]] = [[] for _ in features]
    ended = torch.zeros(len(features), dtype=torch.bool)
    for number in range(max_tokens):
        barred = torch.tensor(at_first if number == 0 else silent)
        chosen = logits.index_fill(1, barred, -torch.inf).argmax(dim=1)
        ended |= chosen == end
        if ended.all():
            break
        for row in torch.nonzero(~ended).flatten().tolist():
            texts[row].append(int(chosen[row]))
        logits = writing.send(chosen)
    return prompts, texts
