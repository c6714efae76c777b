"""Turn a GGUF language model into transformers' configuration and tensor names.

Two things are undone: llama.cpp reorders the rows of Llama's q and k projections, and it stores
Gemma's norm gains as 1 + w where transformers stores w.

Source: llama.cpp's convert_hf_to_gguf.py, read backwards. Checked once against transformers 5.23's
own reader on SmolLM2-135M (Q4_1) and Gemma-3-270M (Q8_0/Q5_0/Q4_K/Q6_K): every tensor equal bit
for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Size, Tensor

from attar import disk
from attar.errors import ModelError
from attar.gguf_names import FAMILIES, Family, transformers_name
from attar.load.extras import import_extra
from attar.load.gguf_file import GgufFile, decode_tensor, read_gguf
from attar.load.gguf_tokenizer import tokenizer_json
from attar.load.parts import Parts
from attar.records import Architecture

_GEMMA3_27B_LAYERS = 62  # llama.cpp recognises the one size with another attention scale by this


def read_gguf_model(path: Path) -> Parts:
    """Read a GGUF file of a known architecture.

    Raises:
        ModelError: The file is damaged, or of an architecture or with a feature not known here.
    """
    import_extra("gguf", "language")
    file = read_gguf(path)
    architecture = file.metadata.get("general.architecture")
    if architecture not in FAMILIES:
        raise ModelError(
            f"{path.name} holds a model of architecture {architecture!r}; "
            f"known from GGUF: {', '.join(FAMILIES)}",
            hint="llama.cpp may run it; give the model as a Hugging Face folder (config.json, "
            "model.safetensors)",
        )
    family = FAMILIES[architecture]
    config = _config(file, architecture, family)
    numbers = sum(Size(tensor.shape).numel() for tensor in file.tensors.values())
    # Decoded once: of a large model onto disk.
    scratch = disk.Scratch(on_disk=4 * numbers > disk.HELD_AT_MOST_BYTES)
    state = {
        _name(name, family): scratch.moved(_tensor(file, name, family, config))
        for name in file.tensors
    }
    files = {"tokenizer.json": tokenizer_json(file.metadata, architecture)}
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    return Parts(
        architecture=Architecture("causal-language", config),
        task="language",
        state=state,
        origin=f"GGUF file {path.name}",
        licence=str(file.metadata.get("general.license", "unknown")),
        files=files,
        source_bytes=file.tensor_bytes,
    )


def _config(file: GgufFile, architecture: str, family: Family) -> dict[str, Any]:
    def stated(key: str) -> Any:
        name = f"{architecture}.{key}"
        if name not in file.metadata:
            raise ModelError(
                f"{file.path.name} does not state {name}", hint="convert the model to GGUF again"
            )
        return file.metadata[name]

    scaling = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise ModelError(
            f"{file.path.name} uses scaled rotary positions, which are not read from GGUF",
            hint="llama.cpp may run it; give the model as a Hugging Face folder (config.json, "
            "model.safetensors)",
        )
    heads, width = stated("attention.head_count"), stated("embedding_length")
    head_width = file.metadata.get(f"{architecture}.attention.key_length", width // max(heads, 1))
    tokens = file.metadata.get("tokenizer.ggml.tokens", ())
    config = {
        "model_type": family.model_type,
        "vocab_size": file.metadata.get(f"{architecture}.vocab_size", len(tokens)),
        "hidden_size": width,
        "intermediate_size": stated("feed_forward_length"),
        "num_hidden_layers": stated("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.metadata.get(f"{architecture}.attention.head_count_kv", heads),
        "head_dim": head_width,
        "max_position_embeddings": stated("context_length"),
        "rms_norm_eps": stated("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    theta = file.metadata.get(f"{architecture}.rope.freq_base", 10000.0)
    return config | (
        _gemma3_config(config, theta, stated("attention.sliding_window"))
        if architecture == "gemma3"
        else {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    )


def _gemma3_config(config: Mapping[str, Any], theta: float, window: int) -> dict[str, Any]:
    head_width = config["head_dim"]
    if config["num_hidden_layers"] == _GEMMA3_27B_LAYERS:
        head_width = config["hidden_size"] // config["num_attention_heads"]
    local = {"rope_type": "default", "rope_theta": 10000.0}  # fixed in llama.cpp as well
    return {
        "sliding_window": window,
        "query_pre_attn_scalar": head_width,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": theta},
            "sliding_attention": local,
        },
    }


def _name(name: str, family: Family) -> str:
    found = transformers_name(name, family)
    if found is None:
        raise ModelError(
            f"the GGUF file holds a tensor {name}, which a {family.model_type} model does not have",
            hint="llama.cpp may run it; give the model as a Hugging Face folder (config.json, "
            "model.safetensors)",
        )
    return found


def _tensor(file: GgufFile, name: str, family: Family, config: Mapping[str, Any]) -> Tensor:
    tensor = decode_tensor(file, name)
    if family.gain_offset and name.endswith("norm.weight"):
        return tensor - family.gain_offset
    if family.rows_permuted and ".attn_q." in name:
        return _pair_halves(tensor, config["num_attention_heads"], name)
    if family.rows_permuted and ".attn_k." in name:
        return _pair_halves(tensor, config["num_key_value_heads"], name)
    return tensor


def _pair_halves(tensor: Float[Tensor, "rows ..."], heads: int, name: str) -> Tensor:
    """Rows of a head go from rotary pairs side by side back to first halves, then second halves."""
    if heads < 1 or tensor.shape[0] % (2 * heads):
        raise ModelError(
            f"the tensor {name} has {tensor.shape[0]} rows, which do not split into {heads} heads",
            hint="convert the model to GGUF again",
        )
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()
