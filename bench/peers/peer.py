"""What the scripts of all peers share. Runs in the environment of the peer, and imports no Attar.

compress.py JOB SETTING OUT

JOB/kind.txt                 language, encoder, speech or vision
JOB/model                    Hugging Face folder; of vision layers.json, weights and program.pt2
JOB/calibration.safetensors  inputs by name, `samples ...`; of a language model `tokens`
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# Of a stored weight from its original, as a share of it, where it is taken for the same.
FARTHEST = 0.7


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
    def kind(self) -> str:
        """What the model does."""
        return (self.folder / "kind.txt").read_text("utf-8")

    @property
    def calibration(self) -> dict[str, torch.Tensor]:
        """Inputs by name."""
        return load_file(self.folder / "calibration.safetensors")

    @property
    def tokens(self) -> torch.Tensor:
        """Calibration text, `sequences length`."""
        return self.calibration["tokens"]

    def model(self, dtype: torch.dtype) -> torch.nn.Module:
        """Load the original as its users do; of a vision model the layers alone."""
        if self.kind == "vision":
            return Layers(self.folder / "model").to(dtype).eval()
        import transformers

        folder = self.folder / "model"
        loaders = {
            "language": (transformers.AutoModelForCausalLM, {}),
            "encoder": (transformers.AutoModel, {"add_pooling_layer": False}),
            "speech": (transformers.WhisperForConditionalGeneration, {}),
        }
        kind, settings = loaders[self.kind]
        return kind.from_pretrained(folder, dtype=dtype, **settings).eval()

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


class Layers(torch.nn.Module):
    """The layers of a network by their names, without what runs them: rounding needs no more."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        for name, settings in json.loads((folder / "layers.json").read_text("utf-8")).items():
            kind = getattr(torch.nn, settings.pop("kind"))
            parent, parts = self, name.split(".")
            for part in parts[:-1]:
                if part not in parent._modules:
                    parent.add_module(part, torch.nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(parts[-1], kind(**settings))
        self.load_state_dict(load_file(folder / "model.safetensors"))


def tied_head(model: torch.nn.Module) -> list[str]:
    """A head that is the embedding: treating it alone would store the table twice."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    return [n for n in ("lm_head", "proj_out") if tied and hasattr(model, n)]


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


def matched(weights: Mapping[str, torch.Tensor], stored: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Parameters as a graph stores them: under other names, some transposed.

    Each is the array of its size, either way round, that is nearest; none may be far.
    """
    arrays = [torch.from_numpy(array).float() for array in stored]
    found = {}
    for name, weight in weights.items():
        fitting = [
            turned.reshape(weight.shape)
            for array in arrays
            if array.numel() == weight.numel()
            for turned in (array, array.squeeze().transpose(0, -1))
        ]
        errors = [float((one - weight).norm() / (weight.norm() + 1e-9)) for one in fitting]
        nearest = min(range(len(errors)), key=errors.__getitem__, default=None)
        if nearest is None or errors[nearest] > FARTHEST:
            sys.exit(f"{name} is not in the graph: {min(errors, default='nothing of its size')}")
        found[name] = fitting[nearest]
    return found
