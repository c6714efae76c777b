"""Models larger than memory: peak memory and seconds of `attar compress` as a model grows.

Llama shapes with random weights, in bfloat16 and in several files, as a Hugging Face folder; the
command runs in a fresh process. What such a model loses means nothing; what it takes does. The
last of the tokens of SmolLM2's tokenizer are cut off where a shape has fewer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compress_command import compress, report_of, run
from results_file import Bench, Finding, Options, Row, main, number, of_model

# Targets, as issue 3 states them.
MOST_BYTES = 4 * 2**30
FORECAST_WITHIN = 0.25
# Linear: seconds of one more parameter, between two shapes, at most this many times as before.
LINEAR_WITHIN = 1.25

BUILD = "--build"  # this script as the child that makes a folder
STANDARD_DEVIATION = 0.02  # of Llama's weights before training
LAYERS_PER_FILE = 8
# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
SHAPES: Mapping[str, tuple[int, int, int, int, int, int, bool]] = {
    "llama-135m": (576, 1536, 30, 9, 3, 49152, True),  # SmolLM2-135M
    "llama-360m": (960, 2560, 32, 15, 5, 49152, True),  # SmolLM2-360M
    "llama-1b": (2048, 5632, 22, 32, 4, 32000, False),  # TinyLlama-1.1B
    "llama-4m": (64, 128, 2, 4, 2, 49152, True),
}
MODELS = ("llama-135m", "llama-360m", "llama-1b")
SETTINGS = {"size": "25%", "rounds": "1", "calibration": "1024", "recovery": "512", "audit": "512"}


def measure(options: Options) -> Iterator[Row]:
    settings = {**SETTINGS, "data": str(options.wikitext / "valid.txt")}
    typed = [part for key, value in settings.items() for part in (f"--{key}", value)]
    for name in options.models:
        with TemporaryDirectory() as folder:
            source, out = Path(folder) / name, Path(folder) / "out"
            run([sys.executable, __file__, BUILD, name, str(source)], Path(folder) / "build.log")
            done = compress(out, [str(source), *typed])
            report = report_of(out)
            stored = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        forecast, size = report["memory"]["forecast_bytes"], report["size"]
        yield {
            "model": name,
            "parameters": size["bytes_before"] // 2,
            "source_bytes": stored,
            "peak_bytes": done.peak_bytes,
            "peak_over_limit": done.peak_bytes / MOST_BYTES,
            "forecast_over_measured": forecast / done.peak_bytes,
            "seconds": done.seconds,
            "stages": "; ".join(f"{k} {v:.1f}" for k, v in report["seconds"].items()),
            "written_bytes": size["bytes_after"],
            "command": " ".join(("attar compress", name, *typed)).replace(str(options.shared), "…"),
        }


def build(name: str, folder: Path) -> None:
    """Write a folder as transformers does, a few layers at a time."""
    import torch
    from safetensors.torch import save_file

    hidden, _, layers, _, _, vocabulary, tied = SHAPES[name]
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    starts = range(0, layers, LAYERS_PER_FILE)
    for count, start in enumerate([*starts, layers]):
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(start, min(layers, start + LAYERS_PER_FILE)):
            shapes |= layer_shapes(name, layer)
        if start == layers:
            ends = ("model.embed_tokens.weight", *(() if tied else ("lm_head.weight",)))
            shapes |= dict.fromkeys(ends, (vocabulary, hidden))
            shapes["model.norm.weight"] = (hidden,)
        tensors = {
            key: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.randn(shape, generator=generator).mul_(STANDARD_DEVIATION).bfloat16()
            for key, shape in shapes.items()
        }
        file = f"model-{count + 1:05}-of-{len(starts) + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "config.json").write_text(json.dumps(config(name)))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "tokenizer.json").write_bytes(tokenizer(vocabulary))


def layer_shapes(name: str, number: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's weights and norms, by their names in the file."""
    hidden, inner, _, heads, shared, _, _ = SHAPES[name]
    width = shared * hidden // heads
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (width, hidden),
        "self_attn.v_proj": (width, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    return {f"model.layers.{number}.{part}.weight": shape for part, shape in shapes.items()}


def config(name: str) -> dict[str, Any]:
    """Describe a shape as config.json does."""
    hidden, inner, layers, heads, shared, vocabulary, tied = SHAPES[name]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def tokenizer(vocabulary: int) -> bytes:
    """Give SmolLM2's tokenizer, its last tokens cut off; a merge's token comes after its parts."""
    from attar.records import Recipe
    from attar.session import open_model

    described: dict[str, Any] = json.loads(open_model(Recipe("smollm2")).files["tokenizer.json"])
    model = described["model"]
    model["vocab"] = {word: place for word, place in model["vocab"].items() if place < vocabulary}
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    model["merges"] = [
        list(pair) for pair in pairs if all(p in model["vocab"] for p in (*pair, "".join(pair)))
    ]
    return json.dumps(described).encode()


def check(rows: list[dict[str, str]]) -> list[Finding]:
    findings = []
    for model in MODELS:
        row = (of_model(rows, model) or [{}])[0]
        findings += [
            Finding(f"{model}, peak over 4 GiB", number(row, "peak_over_limit"), at_most=1),
            Finding(
                f"{model}, forecast over measured peak",
                number(row, "forecast_over_measured"),
                at_least=1 - FORECAST_WITHIN,
                at_most=1 + FORECAST_WITHIN,
            ),
        ]
    small, middle, large = ((of_model(rows, model) or [{}])[0] for model in MODELS)
    findings.append(
        Finding(
            "seconds of one more parameter from 360M to 1B, over those from 135M to 360M",
            _slope(middle, large) / _slope(small, middle),
            at_most=LINEAR_WITHIN,
        )
    )
    return findings


def _slope(less: Mapping[str, str], more: Mapping[str, str]) -> float:
    grown = number(more, "parameters") - number(less, "parameters")
    return (number(more, "seconds") - number(less, "seconds")) / grown


if __name__ == "__main__":
    if sys.argv[1:2] == [BUILD]:
        build(sys.argv[2], Path(sys.argv[3]))
        sys.exit()
    main(
        Bench(
            name="scale",
            about="Peak memory and seconds as a model grows.",
            models=MODELS,
            quick_models=("llama-4m",),
            measure=measure,
            check=check,
        )
    )
