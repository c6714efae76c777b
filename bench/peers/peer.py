"""What the scripts of all peers share. Runs in the environment of the peer, and imports no Attar.

compress.py JOB SETTING OUT

JOB/model                    Hugging Face folder, float32
JOB/calibration.safetensors  `tokens`, `sequences length`
JOB/source.gguf              where the model came from, if from there (its tokenizer is in it)
OUT/artifact                 what a user of the peer would ship: this is weighed
OUT/weights.safetensors      the same weights as numbers: these are judged
OUT/facts.json               seconds and peak memory until the artifact was there
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class Job:
    """One compression that was asked for."""

    def __init__(self, job: Path, setting: str, out: Path, started: float) -> None:
        self.folder, self.setting, self.out, self._started = job, setting, out, started
        self.artifact.mkdir(parents=True, exist_ok=True)

    @property
    def artifact(self) -> Path:
        """Folder to write to."""
        return self.out / "artifact"

    @property
    def tokens(self) -> torch.Tensor:
        """Calibration text, `sequences length`."""
        return load_file(self.folder / "calibration.safetensors")["tokens"]

    def model(self, dtype: torch.dtype) -> torch.nn.Module:
        """Load the original as its users do."""
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

        folder = self.folder / "model"
        causal = AutoConfig.from_pretrained(folder).model_type in ("llama", "gemma3_text")
        kind = AutoModelForCausalLM if causal else AutoModel
        return kind.from_pretrained(folder, dtype=dtype).eval()

    def numbers(self) -> tuple[float, ...]:
        """Take the numbers from a setting such as "4 bits, groups of 64"."""
        words = self.setting.replace(",", " ").split()
        return tuple(float(word) for word in words if word.replace(".", "").isdigit())

    def written(self) -> None:
        """Stop the clock: the artifact is there."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        facts = {"seconds": time.time() - self._started, "peak_bytes": peak}
        (self.out / "facts.json").write_text(json.dumps(facts))

    def judge(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Keep weights, by transformers' names, for the judge."""
        kept = {name: w.detach().to(torch.float32).contiguous() for name, w in weights.items()}
        save_file(kept, self.out / "weights.safetensors")


def main(compress: Callable[[Job], None]) -> None:
    """Do what was typed."""
    job, setting, out, started = sys.argv[1:]
    torch.manual_seed(0)
    compress(Job(Path(job), setting, Path(out), float(started)))


def plain(module: torch.nn.Module, treated: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All weights of a model: of the treated modules as given, of the others as they are."""
    numbers = {
        name: parameter
        for name, parameter in module.named_parameters()
        if name.endswith((".weight", ".bias")) and type(parameter) is torch.nn.Parameter
    }
    return {**numbers, **{f"{name}.weight": weight for name, weight in treated.items()}}
