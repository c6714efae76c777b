"""What GGUF calls things: tensors, rules that cut text, kinds of tokens. Read and written by it.

Source: llama.cpp's convert_hf_to_gguf.py and gguf-py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The file in a folder written for llama.cpp.
FILE = "model.gguf"

_GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ATTENTION_AND_MLP = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Family:
    """How one architecture's GGUF differs from transformers.

    Attributes:
        model_type: Transformers' name.
        layer_names: Name inside a block to transformers' name inside a layer.
        rows_permuted: Whether the rows of q and k are in llama.cpp's rotary order.
        gain_offset: What the file adds to every norm gain.
    """

    model_type: str
    layer_names: Mapping[str, str]
    rows_permuted: bool
    gain_offset: float


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "llama", {**_ATTENTION_AND_MLP, "ffn_norm": "post_attention_layernorm"}, True, 0.0
    ),
    "gemma3": Family(
        "gemma3_text",
        {
            **_ATTENTION_AND_MLP,
            "ffn_norm": "pre_feedforward_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
        },
        False,
        1.0,
    ),
}


def transformers_name(name: str, family: Family) -> str | None:
    """Turn a tensor's name in GGUF into transformers'; None where the family has no such tensor."""
    stem, _, suffix = name.rpartition(".")
    if stem in _GLOBAL_NAMES:
        return f"{_GLOBAL_NAMES[stem]}.{suffix}"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if block and block[2] in family.layer_names:
        return f"model.layers.{block[1]}.{family.layer_names[block[2]]}.{suffix}"
    return None


def gguf_name(name: str, family: Family) -> str | None:
    """Turn transformers' name of a tensor into that in GGUF; None where there is none."""
    stem, _, suffix = name.rpartition(".")
    for short, long in _GLOBAL_NAMES.items():
        if stem == long:
            return f"{short}.{suffix}"
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if block:
        for short, long in family.layer_names.items():
            if block[2] == long:
                return f"blk.{block[1]}.{short}.{suffix}"
    return None


# ---------------------------------------------------------------------------------------------
# vocabularies

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # llama.cpp's kinds of tokens
SPACE = "\u2581"  # how SentencePiece writes a space

# llama.cpp's names of the rule that cuts text before merging, as tokenizers' own parts.
BYTES_BY_GPT2_RULE = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_BYTES_ONLY = {**BYTES_BY_GPT2_RULE, "use_regex": False}
_DIGIT_BY_DIGIT = {"type": "Digits", "individual_digits": True}
_LLAMA3_RULE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_LLAMA3 = {
    "type": "Split",
    "pattern": {"Regex": _LLAMA3_RULE},
    "behavior": "Isolated",
    "invert": False,
}
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "default": [BYTES_BY_GPT2_RULE],
    "gpt-2": [BYTES_BY_GPT2_RULE],
    "smollm": [_DIGIT_BY_DIGIT, BYTES_BY_GPT2_RULE],
    "llama-bpe": [_SPLIT_LLAMA3, _BYTES_ONLY],
}
