"""What is compressed by `equal_bytes.py`, and what is tried of each tool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from results_file import Options

# Bits per parameter of the whole file, as issue 3 states them.
BITS = (2.25, 2.5, 3.0, 3.5, 4.5, 6.0)


@dataclass(frozen=True)
class Subject:
    """One model to compress.

    Attributes:
        model: What `attar compress` is given.
        kind: Key of SETTINGS.
        n_parameters: Bits are counted over these.
        degrid: Seed, or None.
        counts: Of the samples or tokens of the splits, where they are not the default.
        task: Of code of one's own, or None.
    """

    model: str
    kind: str
    n_parameters: int
    degrid: int | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    task: str | None = None

    def arguments(self, options: Options, data: Path) -> dict[str, str]:
        """Options of `attar compress` but for its size."""
        typed = {"data": str(data)}
        if self.degrid is not None:
            typed["degrid"] = str(self.degrid)
        if self.task is not None:
            typed["task"] = self.task
        for split, count in self.counts.items():
            typed[split] = str(min(count, QUICK_COUNT) if options.quick else count)
        return typed


TOKENS = {"calibration": 16_384}
SENTENCES = {"calibration": 256, "recovery": 64, "audit": 128}
# Clips of which nothing is heard twice: all that the six speakers said.
CLIPS = {"calibration": 16, "recovery": 4, "audit": 4}
QUICK_COUNT = 512
SUBJECTS: Mapping[str, Subject] = {
    **{
        f"smollm2-{seed}": Subject("smollm2", "language", 134_515_008, seed, TOKENS)
        for seed in (0, 1, 2)
    },
    "gemma3-270m-0": Subject("gemma3-270m", "language", 268_098_176, 0, TOKENS),
    "whisper-base": Subject("whisper-base", "speech", 72_593_920, None, CLIPS),
    "minilm": Subject("minilm", "encoder", 22_565_376),
    "mpnet": Subject("mpnet:encoder", "encoder", 108_895_872, None, SENTENCES, "embed"),
    "efficientnet-lite0": Subject("efficientnet-lite0", "vision", 4_652_008),
    "mobilenetv2": Subject("mobilenetv2", "vision", 3_504_872),
}
ATTAR, ATTAR_GGUF = "attar", "attar_gguf"
# What is tried of each peer: everything its users would reach for at these sizes.
OWN = [f"{bits} bits" for bits in BITS]
HQQ = [f"{bits} bits, groups of 64" for bits in (2, 3, 4, 8)]
QUANTO = ["qint2", "qint4", "qint8"]
MODELOPT = ["4.8 bits", "8.0 bits"]
TORCHAO = ["int4, groups of 32", "int4, groups of 64", "int8"]
SETTINGS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "language": {
        ATTAR: OWN,
        ATTAR_GGUF: ["4.75 bits", "5.25 bits", "6.25 bits"],
        "llama_cpp": [
            *("IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K_M", "IQ4_XS", "IQ4_NL"),
            *("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"),
        ],
        "auto_round": [
            "W2A16G64 200 steps",
            "W3A16G64 200 steps",
            "W4A16G64 200 steps",
            "W8A16G64 0 steps",
            "auto 3.0 bits 200 steps",
        ],
        # Its AWQ asks for pinned memory, which there is none of without a GPU.
        "llm_compressor": ["GPTQ 4 bits", "GPTQ 8 bits"],
        "hqq": HQQ,
        "quanto": QUANTO,
        "torchao": TORCHAO,
        "modelopt": MODELOPT,
    },
    "encoder": {
        ATTAR: OWN,
        "llama_cpp": ["Q2_K", "IQ4_NL", "Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0"],
        "hqq": HQQ,
        "quanto": QUANTO,
        "torchao": TORCHAO,
        "modelopt": MODELOPT,
        "nncf_weights": [
            "INT4_SYM, groups of 64",
            "INT4_ASYM, groups of 64",
            "INT4_ASYM, groups of 64, AWQ, scale estimation",
            "INT4_ASYM, groups of 64, all layers",
            "INT8_ASYM",
        ],
        "onnxruntime_weights": [
            "4 bits, blocks of 32",
            "4 bits, blocks of 32, embeddings too",
            "4 bits, blocks of 128, embeddings too",
            "8 bits, blocks of 32",
        ],
    },
    "speech": {ATTAR: OWN, "hqq": HQQ, "quanto": QUANTO, "torchao": TORCHAO},
    "vision": {
        ATTAR: OWN,
        "hqq": HQQ,
        "quanto": QUANTO,
        "torchao": TORCHAO,
        "nncf_weights": ["INT4_ASYM, groups of 64, all layers", "INT8_ASYM"],
    },
}
# Tried, or read up, and not possible here.
UNABLE: Mapping[str, str] = {
    "mpnet:llama_cpp": "llama.cpp has no MPNet: its positions are relative, and those it lacks",
}
