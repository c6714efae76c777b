"""llama.cpp: its own `llama_model_quantize`, as `llama-quantize --imatrix` calls it; the setting is
one of its file types. The importance matrix is E[x²] of every column over the calibration text,
which is what `llama-imatrix` keeps. The library comes from the npm package
@node-llama-cpp/linux-x64, which brings it built.
"""

import ctypes
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gguf
import numpy as np
import torch
from peer import Job, main

LIBRARIES = Path(__file__).parent / "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64"
FILE_TYPES = {
    "Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14,
    "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20,
    "IQ3_XS": 22, "IQ3_XXS": 23, "IQ4_NL": 25, "IQ3_S": 26, "IQ2_S": 28, "IQ4_XS": 30,
}  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
NORMS = {
    "llama": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    "gemma3_text": {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
        "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    },
}  # fmt: skip


# Of BERT, which keeps them in a sentence encoder too; MPNet's positions it does not know.
BERT_FIXED = {
    "embeddings.word_embeddings": "token_embd", "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types", "embeddings.LayerNorm": "token_embd_norm",
}  # fmt: skip
BERT = {
    "attention.self.query": "attn_q", "attention.self.key": "attn_k",
    "attention.self.value": "attn_v", "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm", "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down", "output.LayerNorm": "layer_output_norm",
}  # fmt: skip


class Imatrix(ctypes.Structure):
    """llama_model_imatrix_data of llama.h."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class Settings(ctypes.Structure):
    """llama_model_quantize_params of llama.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("threads", "file_type", "output", "embedding")),
        *((name, ctypes.c_bool) for name in ("requantize", "quantize_output", "copy", "pure")),
        *((name, ctypes.c_bool) for name in ("split", "dry_run")),
        *((name, ctypes.c_void_p) for name in ("imatrix", "kv", "types", "prune")),
    )


def compress(job: Job) -> None:
    model = job.model(torch.float32)
    full = job.out / "full.gguf"
    write_gguf(job, model, full)
    made = job.artifact / f"{job.setting}.gguf"
    quantize(full, made, FILE_TYPES[job.setting], importance(job, model))
    full.unlink()
    job.written()
    job.judge(read_back(made, model))


def name_of(name: str, kind: str) -> str:
    """llama.cpp's name of a tensor."""
    if kind == "bert":
        stem, _, part = name.rpartition(".")
        block = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", stem)
        own = f"blk.{block[1]}.{BERT[block[2]]}" if block else BERT_FIXED[stem]
        return f"{own}.{part}"
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in fixed:
        return f"{fixed[stem]}.weight"
    block, rest = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem).groups()
    return f"blk.{block}.{ {**NAMES, **NORMS[kind]}[rest] }.weight"


def ordered(name: str, weight: torch.Tensor, config: object, *, back: bool) -> torch.Tensor:
    """Rows of q and k in llama.cpp's order, or back; Gemma's gains with their 1."""
    if config.model_type == "gemma3_text":
        return weight + (-1 if back else 1) * (1 if "norm" in name else 0)
    if config.model_type == "bert":
        return weight
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    own = heads.get(name.split(".")[-2])
    if own is None:
        return weight
    half = weight.shape[0] // own // 2
    shape = (own, half, 2, -1) if back else (own, 2, half, -1)
    return weight.reshape(shape).transpose(1, 2).reshape(weight.shape)


def write_gguf(job: Job, model: torch.nn.Module, path: Path) -> None:
    """Everything but the tensors is that of the file the model came from, if it came from one."""
    bert = model.config.model_type == "bert"
    writer = bert_writer(job, model.config, path) if bert else copied_writer(job, path)
    tied = (
        {"lm_head.weight"} if job.kind == "language" and model.config.tie_word_embeddings else set()
    )
    for name, weight in model.named_parameters():
        if name not in tied:
            value = ordered(name, weight.detach(), model.config, back=False)
            writer.add_tensor(name_of(name, model.config.model_type), value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copied_writer(job: Job, path: Path) -> gguf.GGUFWriter:
    source = gguf.GGUFReader(job.folder / "source.gguf")
    architecture = source.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    skipped = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for name, field in source.fields.items():
        if not name.startswith(skipped):
            nested = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], nested)
    return writer


def bert_writer(job: Job, config: object, path: Path) -> gguf.GGUFWriter:
    """What llama.cpp's own converter writes of a BERT sentence encoder."""
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    read = json.loads((job.folder / "model" / "tokenizer.json").read_text("utf-8"))
    tokens = sorted(read["model"]["vocab"], key=read["model"]["vocab"].get)
    # Its word pieces start with the mark of a space where a word starts.
    pieces = [t[2:] if t.startswith("##") else t if t[0] == "[" else f"\u2581{t}" for t in tokens]
    writer.add_tokenizer_model("bert")
    writer.add_token_type_count(config.type_vocab_size)
    writer.add_token_list(pieces)
    writer.add_token_types([1] * len(pieces))
    return writer


def importance(job: Job, model: torch.nn.Module) -> dict[str, np.ndarray]:
    """E[x²] of each column of each linear map."""
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def add(_module: object, inputs: tuple[torch.Tensor, ...], _output: object) -> None:
            power = inputs[0].detach().flatten(0, -2).square().sum(0)
            sums[name] = sums.get(name, 0) + power

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(hook(name_of(f"{name}.weight", model.config.model_type)))
    masks = job.calibration.get("attention")
    with torch.no_grad():
        for number, row in enumerate(job.tokens):  # without the filling of a short sentence
            tokens = row if masks is None else row[masks[number].bool()]
            model.base_model(tokens[None])  # its head is not among those that are looked at
    n_tokens = job.tokens.numel() if masks is None else int(masks.sum())
    return {name: (total / n_tokens).numpy() for name, total in sums.items()}


def quantize(full: Path, made: Path, file_type: int, power: dict[str, np.ndarray]) -> None:
    for name in ("libggml-base.so", "libggml.v0.5.0.so"):
        ctypes.CDLL(str(LIBRARIES / name), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(LIBRARIES / "libllama.v0.5.0.so"))
    library.llama_backend_init()
    library.llama_model_quantize_default_params.restype = Settings
    settings = library.llama_model_quantize_default_params()
    rows = (Imatrix * (len(power) + 1))()
    for row, (name, values) in zip(rows, power.items(), strict=False):
        row.name, row.data, row.size = name.encode(), values.ctypes.data, len(values)
    settings.file_type, settings.threads = file_type, 2
    settings.imatrix = ctypes.cast(rows, ctypes.c_void_p)
    library.llama_model_quantize.restype = ctypes.c_uint32
    library.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
    code = library.llama_model_quantize(
        str(full).encode(), str(made).encode(), ctypes.byref(settings)
    )
    if code:
        sys.exit(f"llama_model_quantize ended with {code}")


def read_back(made: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {t.name: t for t in gguf.GGUFReader(made).tensors}
    weights, types = {}, {}
    for name, weight in model.named_parameters():
        tensor = found.get(name_of(name, model.config.model_type))
        if tensor is None:
            continue  # a tied head
        numbers = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        weights[name] = ordered(name, numbers.view(weight.shape), model.config, back=True)
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
    print(json.dumps(types))
    return weights


main(compress)
