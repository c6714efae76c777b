"""What the peers that compute in 8 bits share. Runs in the environment of the peer.

compress.py JOB SETTING OUT STARTED

JOB/model.onnx        the original, in floats
JOB/calibration.npz   inputs to calibrate on, by name, samples first
JOB/judged.npz        inputs to answer
OUT/artifact          what a user of the peer would ship: this is weighed
OUT/outputs.npy       its answers, computed by the peer's own engine
OUT/facts.json        seconds and peak memory until the artifact was there
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

Sample = dict[str, np.ndarray]


class Job:
    """One compression that was asked for."""

    def __init__(self, job: Path, setting: str, out: Path, started: float) -> None:
        self.folder, self.setting, self.out, self._started = job, setting, out, started
        self.artifact.mkdir(parents=True, exist_ok=True)

    @property
    def artifact(self) -> Path:
        """Folder to write to."""
        return self.out / "artifact"

    def samples(self, name: str) -> Iterator[Sample]:
        """One sample at a time."""
        held = np.load(self.folder / f"{name}.npz")
        inputs = {key: held[key] for key in held.files}
        for number in range(len(next(iter(inputs.values())))):
            yield {key: values[number : number + 1] for key, values in inputs.items()}

    def written(self) -> None:
        """Stop the clock: the artifact is there."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        facts = {"seconds": time.time() - self._started, "peak_bytes": peak}
        (self.out / "facts.json").write_text(json.dumps(facts))

    def answer(self, run: Callable[[Mapping[str, np.ndarray]], np.ndarray]) -> None:
        """Keep the answers to every judged input."""
        np.save(self.out / "outputs.npy", np.concatenate([run(s) for s in self.samples("judged")]))


def main(compress: Callable[[Job], None]) -> None:
    """Do what was typed."""
    job, setting, out, started = sys.argv[1:]
    compress(Job(Path(job), setting, Path(out), float(started)))
