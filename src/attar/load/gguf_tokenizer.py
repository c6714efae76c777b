"""Write the tokenizer.json that a GGUF file's vocabulary stands for.

Built from the vocabulary and merges alone, which takes a second or two where transformers' own
conversion takes many. Ids were compared with transformers' conversion on English, code, digits,
Cyrillic and Arabic text; the one difference is wanted: numbers are split into digits where the file
says so ("smollm"), as in the model's original tokenizer and in llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from attar.errors import ModelError
from attar.gguf_names import (
    BYTES_BY_GPT2_RULE,
    CONTROL,
    PRE_TOKENIZERS,
    SPACE,
    USER_DEFINED,
)


def tokenizer_json(metadata: Mapping[str, Any], architecture: str) -> bytes:
    """Build tokenizer.json from the metadata of a GGUF file.

    Raises:
        ModelError: The file holds no vocabulary, or one of a kind not known here.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise _unknown("it holds no vocabulary")
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        body = _byte_level(metadata, tokens)
    elif kind == "llama":
        body = _sentencepiece(metadata, tokens, merges_in_token_order=architecture == "gemma3")
    else:
        raise _unknown(f"its tokenizer is of the kind {kind!r}; known: gpt2, llama")
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(metadata, list(body["model"]["vocab"])),
        **body,
        "post_processor": _first_token(metadata, tokens, default=kind == "llama"),
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _unknown(reason: str) -> ModelError:
    return ModelError(
        f"the GGUF file's tokenizer cannot be read: {reason}",
        hint="give the model as a Hugging Face folder with a tokenizer.json",
    )


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    rule = metadata.get("tokenizer.ggml.pre", "default")
    if rule not in PRE_TOKENIZERS:
        raise _unknown(f"it cuts text by the rule {rule!r}; known: {', '.join(PRE_TOKENIZERS)}")
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise _unknown("it holds no merges")
    steps = PRE_TOKENIZERS[rule]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {**BYTES_BY_GPT2_RULE, "add_prefix_space": True},
        "model": _merging_model(tokens, merges, unknown=None, bytes_for_unknown=False),
    }


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], *, merges_in_token_order: bool
) -> dict[str, Any]:
    # The file spells tokens that are nothing but spaces with spaces, all others with the mark.
    respelled = [SPACE * len(t) if " " in t and not t.strip() else t for t in tokens]
    scores = metadata.get("tokenizer.ggml.scores")
    if merges_in_token_order or not isinstance(scores, list):
        scores = [-float(position) for position in range(len(tokens))]
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    ]
    undo: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
        undo.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = tokens[_token_id(metadata, "unknown", len(tokens)) or 0]
    merges = merges_of_vocabulary(respelled, scores)
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": undo},
        "model": _merging_model(respelled, merges, unknown=unknown, bytes_for_unknown=True),
    }


def merges_of_vocabulary(tokens: Sequence[str], scores: Sequence[float]) -> list[str]:
    """Every way to make a token of two others, best first.

    SentencePiece keeps no merges; it joins the two neighbours whose union has the best score.
    """
    rank = {token: position for position, token in enumerate(tokens)}
    found: list[tuple[float, int, int, int, int, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in rank and right in rank:
                # Ties in the order transformers' generate_merges leaves them: longer halves first,
                # then the position of the halves in the vocabulary.
                order = (-score, -len(left), -len(right), rank[left], rank[right])
                found.append((*order, f"{left} {right}"))
    return [pair for *_, pair in sorted(found)]


def _merging_model(
    tokens: Sequence[str], merges: Sequence[str], *, unknown: str | None, bytes_for_unknown: bool
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unknown is not None,
        "byte_fallback": bytes_for_unknown,
        "ignore_merges": False,
        "vocab": {token: position for position, token in enumerate(tokens)},
        "merges": list(merges),
    }


def _added_tokens(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[dict[str, Any]]:
    """Tokens that are matched whole before any merging: control tokens and user-defined ones."""
    types = metadata.get("tokenizer.ggml.token_type") or ()
    return [
        {
            "id": position,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == CONTROL,
        }
        for position, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in (CONTROL, USER_DEFINED)
    ]


def _token_id(metadata: Mapping[str, Any], role: str, n_tokens: int) -> int | None:
    position = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if position is None:
        return None
    if not isinstance(position, int) or not 0 <= position < n_tokens:
        raise _unknown(f"its {role} token is number {position} of {n_tokens}")
    return position


def _first_token(
    metadata: Mapping[str, Any], tokens: Sequence[str], *, default: bool
) -> dict[str, Any] | None:
    """Put the begin-of-text token in front where the file says so."""
    position = _token_id(metadata, "bos", len(tokens))
    if position is None or not metadata.get("tokenizer.ggml.add_bos_token", default):
        return None
    token = tokens[position]
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, first, second],
        "special_tokens": {token: {"id": token, "ids": [position], "tokens": [token]}},
    }
