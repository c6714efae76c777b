"""Read and write folders as Hugging Face's transformers keeps models. Code in them is never run."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from attar import disk
from attar.errors import AttarError, ModelError, OutputError
from attar.load.builders import build_empty, tied_names
from attar.load.extras import import_extra
from attar.load.openers import quantized
from attar.load.parts import Parts
from attar.load.tensor_files import (
    float32_bytes,
    map_safetensors,
    read_header,
    read_safetensors,
    write_safetensors,
)
from attar.records import Architecture, Model

_SOURCE = "attar_source.json"
_KEPT_FILES = (
    "tokenizer.json",
    "chat_template.jinja",
    "generation_config.json",
    "NOTICE",
    "GEMMA_TERMS.txt",
)
# About the file the settings came from, or code to run; nothing a module is built from.
_DROPPED_SETTINGS = ("transformers_version", "torch_dtype", "dtype", "auto_map", "architectures")


def clean_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the settings a module is built from."""
    return {
        name: value
        for name, value in config.items()
        if not name.startswith("_") and name not in _DROPPED_SETTINGS
    }


def read_huggingface(folder: Path) -> Parts:
    """Read a folder with config.json and safetensors weights, whole or in shards.

    Raises:
        ModelError: A file is missing or damaged, or the model is quantized or of an unknown kind.
    """
    config = _read_json(folder / "config.json")
    if "quantization_config" in config:
        raise quantized(folder.name, config["quantization_config"])
    if not isinstance(config.get("model_type"), str):
        raise ModelError(
            f"{folder.name}/config.json does not state a model_type",
            hint="give a folder that transformers' save_pretrained wrote",
        )
    state = _read_weights(folder)
    stored = sum(tensor.nbytes for tensor in state.values())
    architecture, task = _architecture(folder, config)
    if architecture.builder == "sentence-bert":
        state = _sentence_state(state)
    if architecture.builder == "causal-language":
        state = _with_known_names(folder, architecture, state)
    source = _read_json(folder / _SOURCE) if (folder / _SOURCE).is_file() else {}
    return Parts(
        architecture=architecture,
        task=task,
        state=state,
        origin=str(source.get("origin", f"folder {folder.name}")),
        licence=str(source.get("licence", _stated_licence(folder))),
        files=_read_files(folder),
        source_bytes=_whole_number(source.get("source_bytes"), stored),
    )


def _whole_number(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and value > 0 else otherwise


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{path.name} cannot be read in {path.parent.name}: {error.strerror}",
            hint="give a folder that transformers' save_pretrained wrote",
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path.parent.name}/{path.name} is not readable JSON: {error}",
            hint="fetch the file again",
        ) from error
    if not isinstance(found, dict):
        raise ModelError(
            f"{path.parent.name}/{path.name} holds a {type(found).__name__}, not an object",
            hint="fetch the file again",
        )
    return found


def _read_weights(folder: Path) -> dict[str, Tensor]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return _read_files_of_weights([whole])
    if not index.is_file():
        raise ModelError(
            f"{folder.name} holds no model.safetensors; other formats are not read, because "
            "loading them can run code",
            hint="save the model with save_pretrained(..., safe_serialization=True)",
        )
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
        raise ModelError(f"{index.name} holds no weight_map", hint="fetch the file again")
    shards = sorted(set(places.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise ModelError(
                f"{index.name} names the file {shard!r} outside the folder",
                hint="do not use this folder",
            )
    return _read_files_of_weights([folder / shard for shard in shards])


def _read_files_of_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """Read tensors; those of a large model stay on disk."""
    large = sum(float32_bytes(read_header(file)) for file in files) > disk.HELD_AT_MOST_BYTES
    state: dict[str, Tensor] = {}
    for file in files:
        state |= map_safetensors(file) if large else read_safetensors(file)
    return state


def _architecture(folder: Path, config: Mapping[str, Any]) -> tuple[Architecture, str]:
    kind = config["model_type"]
    if kind == "whisper":
        return Architecture("whisper", clean_config(config)), "transcribe"
    if kind == "bert":
        settings = {"bert": clean_config(config), "normalise": _normalises(folder)}
        return Architecture("sentence-bert", settings), "embed"
    auto = import_extra("transformers.models.auto.modeling_auto", "language")
    if kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{folder.name} holds a {kind} model; causal language models, Whisper and BERT "
            "sentence encoders are read",
            hint="load it yourself and name the function: `package.module:factory`",
        )
    return Architecture("causal-language", clean_config(config)), "language"


def _normalises(folder: Path) -> bool:
    """Whether a sentence encoder scales its vectors; refuse one that does not take the mean."""
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.is_file() and not _read_json(pooling).get("pooling_mode_mean_tokens", False):
        raise ModelError(
            f"{folder.name} does not pool by the mean over tokens",
            hint="load it yourself and name the function: `package.module:factory`",
        )
    modules = folder / "modules.json"
    return not modules.is_file() or "Normalize" in modules.read_text(
        encoding="utf-8", errors="replace"
    )


def _sentence_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"encoder.{name.removeprefix('bert.')}": tensor
        for name, tensor in state.items()
        # Heads for other tasks, which a sentence encoder does not use.
        if not name.removeprefix("bert.").startswith(("pooler.", "cls."))
    }


def _with_known_names(
    folder: Path, architecture: Architecture, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Let transformers rename tensors where the file uses names of an older version."""
    empty = build_empty(architecture)
    # Of tied weights, the first name is the one that is always stored.
    repeated = {name for names in tied_names(empty) for name in names[1:]}
    if set(empty.state_dict()) - repeated <= set(state):
        return state
    auto = import_extra("transformers", "language")
    import_extra("transformers.utils.logging", "language").disable_progress_bar()
    try:
        module, loading = auto.AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many kinds for a broken folder
        raise ModelError(
            f"transformers cannot read {folder.name}: {error}", hint="fetch the folder again"
        ) from error
    if loading["missing_keys"] or loading["mismatched_keys"]:
        return state  # `fill` names the tensor
    loaded: dict[str, Tensor] = module.state_dict()
    return loaded


def _read_files(folder: Path) -> dict[str, bytes]:
    files = {n: (folder / n).read_bytes() for n in _KEPT_FILES if (folder / n).is_file()}
    settings = folder / "tokenizer_config.json"
    if "chat_template.jinja" not in files and settings.is_file():
        template = _read_json(settings).get("chat_template")
        if isinstance(template, str):
            files["chat_template.jinja"] = template.encode()
    return files


def _stated_licence(folder: Path) -> str:
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"^license:\s*(\S+)\s*$", text[:4000], re.MULTILINE)
    return found[1] if found else "unknown"


def save_huggingface(model: Model, folder: Path) -> None:
    """Write a folder that transformers and `load_model` read.

    Raises:
        OutputError: The folder exists, or cannot be written.
        ModelError: The model is not one of transformers' kinds.
    """
    if folder.exists():
        raise OutputError(f"{folder} exists already", hint="name a new folder with --out")
    config = _config_of(model)
    prefix = "encoder." if model.architecture.builder == "sentence-bert" else ""
    tied = {name for names in tied_names(model.module) for name in names[1:]}
    state = {
        name.removeprefix(prefix): disk.dense(tensor)
        for name, tensor in model.module.state_dict().items()
        if name not in tied
    }
    source = {
        "origin": model.origin,
        "licence": model.licence,
        "source_bytes": model.source_bytes,
    }
    texts = {"config.json": config, _SOURCE: source, **_side_files(model)}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
            new = Path(temporary) / "model"
            new.mkdir()
            write_safetensors(state, new / "model.safetensors")
            for name, content in model.files.items():
                (new / Path(name).name).write_bytes(content)
            for name, value in texts.items():
                (new / name).parent.mkdir(exist_ok=True)
                text = json.dumps(value, indent=2, ensure_ascii=False)
                (new / name).write_text(text + "\n", encoding="utf-8")
            new.rename(folder)
    except OSError as error:
        if isinstance(error, AttarError):
            raise
        raise OutputError(
            f"{folder} cannot be written: {error.strerror or error}",
            hint="choose another folder with --out, or free some space",
        ) from error


def _config_of(model: Model) -> dict[str, Any]:
    settings = model.architecture.config
    classes = {
        "causal-language": type(model.module).__name__,
        "whisper": "WhisperForConditionalGeneration",
        "sentence-bert": "BertModel",
    }
    if model.architecture.builder not in classes:
        raise ModelError(
            f"a {model.architecture.builder} model has no Hugging Face form",
            hint="language models, Whisper and BERT sentence encoders have one",
        )
    body = settings.get("bert", settings)
    return {**body, "architectures": [classes[model.architecture.builder]], "dtype": "float32"}


def _side_files(model: Model) -> dict[str, Any]:
    """What readers other than Attar need beside the weights."""
    side: dict[str, Any] = {}
    if "tokenizer.json" in model.files:
        side["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast"} | {
            f"{role}_token": token for role, token in _role_tokens(model).items()
        }
    if model.architecture.builder == "sentence-bert":
        kinds = ["Transformer", "Pooling"]
        kinds += ["Normalize"] if model.architecture.config["normalise"] else []
        paths = ["", "1_Pooling", "2_Normalize"]
        side["modules.json"] = [
            {
                "idx": number,
                "name": str(number),
                "path": paths[number],
                "type": f"sentence_transformers.models.{kind}",
            }
            for number, kind in enumerate(kinds)
        ]
        side["1_Pooling/config.json"] = {
            "word_embedding_dimension": model.architecture.config["bert"]["hidden_size"],
            "pooling_mode_mean_tokens": True,
        }
    return side


def _role_tokens(model: Model) -> dict[str, str]:
    tokenizers = import_extra("tokenizers", "language")
    tokenizer = tokenizers.Tokenizer.from_buffer(model.files["tokenizer.json"])
    settings = model.architecture.config.get("bert", model.architecture.config)
    numbers = {role: settings.get(f"{role}_token_id") for role in ("bos", "eos", "pad")}
    tokens = {
        role: tokenizer.id_to_token(number)
        for role, number in numbers.items()
        if isinstance(number, int)
    }
    return {role: token for role, token in tokens.items() if token is not None}
