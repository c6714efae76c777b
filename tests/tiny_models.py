"""Small random models and files that the tests of `load` share."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from attar.records import Architecture

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
GEMMA = {
    **LLAMA,
    "model_type": "gemma3_text",
    "sliding_window": 4,
    "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def random_model(config):
    """A random module of transformers with norms that are not all ones."""
    torch.manual_seed(0)
    if config["model_type"] == "llama":
        module = LlamaForCausalLM(LlamaConfig(**without_type(config)))
    else:
        module = Gemma3ForCausalLM(Gemma3TextConfig(**without_type(config)))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0.0, 0.2)
            if "norm" in name and config["model_type"] == "llama":
                parameter.add_(1.0)
    return module.eval()


def without_type(config):
    return {name: value for name, value in config.items() if name != "model_type"}


def state_of(module):
    """Tensors without the tied head."""
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    if module.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def architecture(config):
    return Architecture("causal-language", config)


def write_huggingface(folder: Path, module, config, **more):
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(state_of(module), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    return folder


# "a" to "z", a few merges, and two control tokens: 61 tokens in all.
TOKENS = (
    ["<s>", "</s>"]
    + [chr(code) for code in range(ord("a"), ord("z") + 1)]
    + [chr(code) for code in range(ord("0"), ord("9") + 1)]
    + ["Ġ", "th", "the", "Ġthe", "12"]
    + [chr(code) for code in range(ord("A"), ord("R") + 1)]
)
MERGES = ["t h", "th e", "Ġ the", "1 2"]


def write_gguf(path: Path, module, config, *, quantization=None, rule="smollm", tokens=TOKENS):
    """Write a Llama as llama.cpp's converter does: rows of q and k in rotary pairs."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_license("apache-2.0")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages }}")
    for name, tensor in state_of(module).items():
        array, target = _as_llama_cpp(name, tensor, config)
        if quantization is None or array.ndim == 1:
            writer.add_tensor(target, array)
        else:
            packed = gguf.quants.quantize(array, quantization)
            writer.add_tensor(target, packed, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _as_llama_cpp(name, tensor, config):
    array = tensor.numpy().astype(np.float32)
    if name == "model.embed_tokens.weight":
        return array, "token_embd.weight"
    if name == "model.norm.weight":
        return array, "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    stem = rest.removesuffix(".weight")
    heads = {
        "self_attn.q_proj": config["num_attention_heads"],
        "self_attn.k_proj": config["num_key_value_heads"],
    }.get(stem)
    if heads:  # as in llama.cpp's convert_hf_to_gguf.py, `permute`
        half = array.shape[0] // heads // 2
        array = array.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(array.shape)
    return np.ascontiguousarray(array), f"blk.{layer}.{_NAMES[stem]}.weight"
