"""Read Whisper from CTranslate2's file into transformers' configuration and tensor names.

Source: CTranslate2's model_spec.py and models/model.cc, binary version 6.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attar.errors import ModelError
from attar.load.mel import log_mel

__all__ = ["log_mel", "read_ctranslate2", "whisper_config", "whisper_state"]

_KNOWN_VERSION = 6
_NUMBER_TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
_MAX_RANK = 4


def read_ctranslate2(data: bytes) -> dict[str, Tensor]:
    """Read every variable of a CTranslate2 model.bin.

    Returns:
        CTranslate2's name to tensor, in the stored number format.

    Raises:
        ModelError: Not such a file, truncated, or of a version not known here.
    """
    try:
        return _read_variables(memoryview(data))
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise ModelError(
            f"model.bin is not a readable CTranslate2 file: {error}",
            hint="fetch the model again; the file may have been cut off",
        ) from error


def _read_variables(data: memoryview) -> dict[str, Tensor]:
    position = 0

    def take(layout: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from(layout, data, position)
        position += struct.calcsize(layout)
        return int(value)

    def text() -> str:
        nonlocal position
        length = take("<H")
        if position + length > len(data):
            raise ValueError("it ends inside a name")
        piece = bytes(data[position : position + length])
        position += length
        return piece.rstrip(b"\0").decode()

    version, kind, _revision, count = take("<I"), text(), take("<I"), take("<I")
    if version != _KNOWN_VERSION or kind != "WhisperSpec":
        raise ValueError(f"it holds a {kind!r} of version {version}, not a WhisperSpec of 6")
    variables: dict[str, Tensor] = {}
    for _ in range(count):
        name, rank = text(), take("<B")
        if rank > _MAX_RANK:
            raise ValueError(f"{name} claims {rank} dimensions")
        shape = tuple(take("<I") for _ in range(rank))
        type_code, n_bytes = take("<B"), take("<I")
        dtype = np.dtype(_NUMBER_TYPES.get(type_code, "V1"))
        expected = math.prod(shape) * dtype.itemsize
        if dtype.kind == "V" or n_bytes != expected or position + n_bytes > len(data):
            raise ValueError(f"{name} of shape {shape} and type {type_code} has {n_bytes} bytes")
        values = np.frombuffer(data, dtype, math.prod(shape), position).reshape(shape)
        position += n_bytes
        variables[name] = torch.from_numpy(values.copy())
    return variables


def whisper_config(
    variables: Mapping[str, Tensor], generation: Mapping[str, Any]
) -> dict[str, Any]:
    """Transformers' configuration from the shapes of the variables.

    Args:
        variables: As `read_ctranslate2` gives them.
        generation: CTranslate2's config.json: suppressed tokens.
    """
    try:
        vocabulary, width = variables["decoder/embeddings/weight"].shape
        return {
            "model_type": "whisper",
            "vocab_size": vocabulary,
            "d_model": width,
            "num_mel_bins": variables["encoder/conv1/weight"].shape[1],
            "encoder_layers": _count_layers(variables, "encoder"),
            "decoder_layers": _count_layers(variables, "decoder"),
            "encoder_attention_heads": int(variables["encoder/num_heads"]),
            "decoder_attention_heads": int(variables["decoder/num_heads"]),
            "encoder_ffn_dim": variables["encoder/layer_0/ffn/linear_0/weight"].shape[0],
            "decoder_ffn_dim": variables["decoder/layer_0/ffn/linear_0/weight"].shape[0],
            "max_source_positions": variables["encoder/position_encodings/encodings"].shape[0],
            "max_target_positions": variables["decoder/position_encodings/encodings"].shape[0],
            "decoder_start_token_id": 50258,
            "bos_token_id": 50257,
            "eos_token_id": 50257,
            "pad_token_id": 50257,
            "suppress_tokens": list(generation.get("suppress_ids", [])),
            "begin_suppress_tokens": list(generation.get("suppress_ids_begin", [])),
        }
    except KeyError as error:
        raise ModelError(
            f"the CTranslate2 file lacks the variable {error.args[0]}", hint="fetch it again"
        ) from error


def _count_layers(variables: Mapping[str, Tensor], part: str) -> int:
    found = (re.match(rf"{part}/layer_(\d+)/", name) for name in variables)
    return len({match[1] for match in found if match})


_LINEAR_NAMES = {
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
}
_NORM_NAMES = {
    "ffn/layer_norm": "final_layer_norm",
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
}
_SUFFIXES = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}
# Numbers about the graph, not weights; transformers' configuration says the same.
_SETTINGS = (
    "num_heads",
    "alignment_heads",
    "alignment_layer",
    "activation",
    "alibi",
    "pre_norm",
    "scale_embeddings",
    "start_from_zero_embedding",
)


def whisper_state(variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename variables to transformers' tensors; stacked projections are cut apart.

    Raises:
        ModelError: A variable has no place in transformers' Whisper.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in variables.items():
        part, _, rest = name.partition("/")
        if rest in _SETTINGS:
            continue
        state |= _renamed(f"model.{part}.", rest, tensor)
    return state


def _renamed(prefix: str, rest: str, tensor: Tensor) -> dict[str, Tensor]:
    stem, _, suffix = rest.rpartition("/")
    ending = _SUFFIXES.get(suffix, "")
    if rest == "embeddings/weight":
        return {f"{prefix}embed_tokens.weight": tensor}
    if rest == "position_encodings/encodings":
        return {f"{prefix}embed_positions.weight": tensor}
    if stem in ("conv1", "conv2", "layer_norm"):
        return {f"{prefix}{stem}.{ending}": tensor}
    layer, _, inner = stem.partition("/")
    inside = f"{prefix}layers.{layer.removeprefix('layer_')}."
    if inner in _NORM_NAMES:
        return {f"{inside}{_NORM_NAMES[inner]}.{ending}": tensor}
    if inner in _LINEAR_NAMES:
        names = _LINEAR_NAMES[inner]
        pieces = dict(zip(names, tensor.chunk(len(names)), strict=True))
        # Whisper's k has no bias; CTranslate2 stores zeros in its place.
        return {
            f"{inside}{target}.{ending}": piece.contiguous()
            for target, piece in pieces.items()
            if not (ending == "bias" and target.endswith("k_proj"))
        }
    raise ModelError(
        f"the CTranslate2 file holds {rest}, which Whisper does not have", hint="fetch it again"
    )
