"""One GGUF file that llama.cpp runs, with exactly the numbers that were priced.

    model.gguf   weights, configuration and vocabulary

Tensors that llama.cpp orders otherwise (rows of Llama's q and k) are put into its order as they are
stored; Gemma's norms get the 1 that llama.cpp expects in them.

Source: llama.cpp's convert_hf_to_gguf.py; what is written here is read back by `load/gguf_model.py`
and, in the tests, by llama.cpp itself.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attar.errors import ModelError
from attar.export.pieces import Content, Piece, Pieces, tensor_bytes
from attar.gguf_names import (
    BYTE,
    CONTROL,
    FAMILIES,
    FILE,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Family,
    gguf_name,
)

# "Guessed": llama.cpp reads the type of each tensor.
MIXED_FILE_TYPE, QUANTIZATION_VERSION = 1024, 2
FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in the file.

    Attributes:
        values: Floats, or the bytes of each row, `rows bytes`.
        block_type: llama.cpp's number of the type of those bytes; None for floats.
    """

    values: Tensor
    block_type: int | None = None


def check_model(config: Mapping[str, Any], files: Mapping[str, bytes], name: str) -> None:
    """Refuse a model that is not written here.

    Raises:
        ModelError: With the reason.
    """
    if (reason := _refusal(config, files)) is not None:
        raise ModelError(
            f"{name} cannot be written as GGUF: {reason}.",
            hint="leave --to out, or use a Llama- or Gemma3-shaped language model.",
        )
    _vocabulary(config, files)


def _refusal(config: Mapping[str, Any], files: Mapping[str, bytes]) -> str | None:
    if config.get("model_type") not in {family.model_type for family in FAMILIES.values()}:
        return f"it is of the kind {config.get('model_type', 'no language model')!r}"
    if "tokenizer.json" not in files:
        return "it has no tokenizer.json"
    return None


def file_contents(
    tensors: Mapping[str, Stored],
    config: Mapping[str, Any],
    files: Mapping[str, bytes],
    name: str,
    licence: str = "unknown",
) -> dict[str, Content]:
    """Make the file; it can be weighed before it is made.

    Args:
        tensors: By transformers' names; norms as floats.
        config: Transformers' configuration.
        files: tokenizer.json, and chat_template.jinja if there is one.

    Raises:
        ModelError: The model is of a kind that is not written here.
    """
    import gguf

    check_model(config, files, name)
    architecture, family = _family(config)
    said = {**_described(config, architecture), **_vocabulary(config, files)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_name(name)
        writer.add_license(licence)
        for key, value in said.items():
            _add(writer, key, value)
        for own, stored in tensors.items():
            _announce(writer, own, stored, family)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        front, step = path.read_bytes(), writer.data_alignment
    front += bytes(-len(front) % step)

    def make() -> Iterator[Piece]:
        yield front
        ordered = (_in_order(own, stored.values, config, family) for own, stored in tensors.items())
        yield from tensor_bytes(ordered, step)

    sizes = [stored.values.nbytes for stored in tensors.values()]
    return {FILE: Pieces(len(front) + sum(size + -size % step for size in sizes), make)}


def _family(config: Mapping[str, Any]) -> tuple[str, Family]:
    for architecture, family in FAMILIES.items():
        if family.model_type == config["model_type"]:
            return architecture, family
    raise AssertionError(config["model_type"])  # refused before


def _add(writer: Any, key: str, value: Any) -> None:
    """Write a value by its Python type; every whole number is a uint32, as llama.cpp reads them."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _announce(writer: Any, name: str, stored: Stored, family: Family) -> None:
    """Say what a tensor is called, its type and its shape; for blocks, in bytes."""
    import gguf

    values = stored.values
    own = gguf_name(name, family)
    if own is None:
        raise ModelError(
            f"GGUF has no name for the tensor {name}.", hint="leave --to out for this model."
        )
    number = FLOAT_TYPES[values.dtype] if stored.block_type is None else stored.block_type
    held = np.dtype(np.uint8 if stored.block_type is not None else np.float32)
    kind = gguf.GGMLQuantizationType(number)
    writer.add_tensor_info(own, tuple(values.shape), held, values.nbytes, raw_dtype=kind)


def _in_order(name: str, values: Tensor, config: Mapping[str, Any], family: Family) -> Tensor:
    """Put rows of q and k into rotary pairs side by side, and the 1 into Gemma's gains."""
    if family.gain_offset and name.endswith("norm.weight"):
        return values + family.gain_offset
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config.get("num_key_value_heads", config["num_attention_heads"]),
    }.get(name.split(".")[-2])
    if not family.rows_permuted or heads is None:
        return values
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)


def _described(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    rope = config["rope_parameters"]
    theta = rope.get("full_attention", rope)["rope_theta"]
    head_width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    facts = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config.get("num_key_value_heads", config["num_attention_heads"]),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": head_width,
        "attention.value_length": head_width,
        "rope.freq_base": float(theta),
        "rope.dimension_count": head_width,
        "vocab_size": config["vocab_size"],
    }
    if architecture == "gemma3":
        facts["attention.sliding_window"] = config["sliding_window"]
    described: dict[str, Any] = {f"{architecture}.{key}": value for key, value in facts.items()}
    return {
        "general.file_type": MIXED_FILE_TYPE,
        "general.quantization_version": QUANTIZATION_VERSION,
        **described,
    }


# ---------------------------------------------------------------------------------------------
# vocabulary


def _vocabulary(config: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    """Write tokenizer.json in llama.cpp's words.

    Raises:
        ModelError: It cuts text by a rule that has no name in llama.cpp.
    """
    described = json.loads(files["tokenizer.json"])
    model = described["model"]
    added = {token["id"]: token for token in described.get("added_tokens", ())}
    spelled = {number: token for token, number in model["vocab"].items()}
    spelled |= {number: token["content"] for number, token in added.items()}
    # Rows of the embedding beyond the vocabulary are never asked for; llama.cpp wants a name each.
    size = max(config["vocab_size"], max(spelled) + 1)
    tokens = [spelled.get(number, f"[PAD{number}]") for number in range(size)]
    bytes_for_unknown = bool(model.get("byte_fallback"))
    facts: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if bytes_for_unknown else "gpt2",
        "tokenizer.ggml.tokens": [_respelled(t) if bytes_for_unknown else t for t in tokens],
        "tokenizer.ggml.token_type": [
            _kind(number, token, added, model.get("unk_token"), number in spelled)
            for number, token in enumerate(tokens)
        ],
        "tokenizer.ggml.add_bos_token": _starts_with_bos(described),
    }
    if bytes_for_unknown:
        facts["tokenizer.ggml.scores"] = [-float(number) for number in range(size)]
        facts["tokenizer.ggml.add_space_prefix"] = "Prepend" in json.dumps(described["normalizer"])
    else:
        facts["tokenizer.ggml.pre"] = _rule(described)
        facts["tokenizer.ggml.merges"] = [
            pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]
        ]
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = config.get(f"{role}_token_id")
        if isinstance(number, int):
            facts[f"tokenizer.ggml.{key}_token_id"] = number
    if model.get("unk_token") in model["vocab"]:
        facts["tokenizer.ggml.unknown_token_id"] = model["vocab"][model["unk_token"]]
    if "chat_template.jinja" in files:
        facts["tokenizer.chat_template"] = files["chat_template.jinja"].decode()
    return facts


def _respelled(token: str) -> str:
    """SentencePiece's tokens of spaces alone are spelled with spaces in GGUF."""
    return " " * len(token) if len(token) > 1 and not token.strip(SPACE) else token


def _kind(
    number: int, token: str, added: Mapping[int, Any], unknown: str | None, known: bool
) -> int:
    if not known:
        return USER_DEFINED
    if token == unknown:
        return UNKNOWN
    if number in added:
        return CONTROL if added[number]["special"] else USER_DEFINED
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return BYTE if is_byte else NORMAL


def _rule(described: Mapping[str, Any]) -> str:
    steps = described["pre_tokenizer"]
    own = steps.get("pretokenizers", [steps])
    for name, parts in PRE_TOKENIZERS.items():
        if name != "default" and own == parts:
            return name
    raise ModelError(
        "the model's tokenizer cuts text by a rule that has no name in llama.cpp.",
        hint="leave --to out for this model.",
    )


def _starts_with_bos(described: Mapping[str, Any]) -> bool:
    after = described.get("post_processor") or {}
    parts = after.get("processors", [after])
    return any(
        "SpecialToken" in first
        for part in parts
        if part.get("type") == "TemplateProcessing"
        for first in part["single"][:1]
    )
