"""Data for modules of any kind: arrays in a .npz or .safetensors file, named like the inputs."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attar.errors import DataError
from attar.load.splits import Counts, Sample, Splits, deal_evenly

if TYPE_CHECKING:
    from attar.records import Batch, Model

TENSOR_SUFFIXES = frozenset({".npz", ".safetensors"})
# The array of true classes, where there is one.
ANSWERS = "answers"
PARTS = Counts(1024, 512, 1024)  # samples where no counts are given: at most, in this proportion


def tensor_splits(
    model: Model,
    source: str | Mapping[str, Any] | None,
    counts: Counts | None,
    *,
    seed: int,
    slices: str | None,
) -> Splits:
    """Samples from arrays whose first dimension is the sample, in shuffled order.

    Raises:
        DataError: No data, an array that is missing, has another shape or kind, or is not finite,
            or too few samples.
    """
    if source is None:
        names = ", ".join(model.examples)
        raise DataError(
            f"{model.name} has no default data.",
            hint=f"give --data FILE.npz or FILE.safetensors with the arrays {names}",
        )
    inputs, arrays, source = _read(model, source)
    total = _sample_count(inputs, source)
    labels = _labels(arrays, slices, total, source)
    answers = _answers(arrays, total, source)
    needed = sum(counts.as_tuple()) if counts else 3
    if total < needed:
        raise DataError(
            f"{source} holds {total} samples; {needed} are needed.",
            hint="give more samples; each is used in one split only",
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    samples = [
        Sample({name: array[one] for name, array in inputs.items()}, labels[one], "", answers[one])
        for one in order
    ]
    dealt = deal_evenly(total, counts or PARTS)
    splits = [tuple(samples[place] for place in chosen) for chosen in dealt]
    left = sorted(set(range(total)).difference(*dealt))[: counts.more if counts else 0]
    more = tuple(samples[place] for place in left)
    return Splits((splits[0], splits[1], splits[2]), f"arrays from {source}", more)


def read_rows(model: Model, file: Path) -> Batch:
    """All samples of a file, in its order.

    Raises:
        DataError: As `tensor_splits`.
    """
    inputs, _, source = _read(model, str(file))
    _sample_count(inputs, source)
    return inputs


def _read(
    model: Model, source: str | Mapping[str, Any]
) -> tuple[Batch, Mapping[str, np.ndarray], str]:
    """The model's inputs, all arrays there are, and what they are called in an error."""
    if isinstance(source, str):
        arrays = _read_arrays(Path(source), ", ".join(model.examples))
    else:
        arrays = {name: np.asarray(array) for name, array in source.items()}
        source = "the data given"
    inputs = {name: _fitting(name, arrays, model.examples, source) for name in model.examples}
    return inputs, arrays, source


def _read_arrays(path: Path, names: str) -> Mapping[str, np.ndarray]:
    hint = f"give a .npz or .safetensors file with the arrays {names}"
    if not path.is_file() or path.suffix.lower() not in TENSOR_SUFFIXES:
        found = f"is a {path.suffix or 'folder'}" if path.exists() else "is not there"
        raise DataError(f"{path} {found}; the model reads tensors.", hint=hint)
    try:
        if path.suffix.lower() == ".npz":
            # opened here, because np.load leaves a broken file open
            with path.open("rb") as file:
                opened = np.load(file, allow_pickle=False)
                if isinstance(opened, np.ndarray):
                    raise ValueError("it holds one array without a name")
                return {name: opened[name] for name in opened.files}
        from safetensors.numpy import load_file

        return dict(load_file(path))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as fault:
        raise DataError(f"{path} cannot be read: {fault}.", hint=hint) from fault
    except Exception as fault:  # SafetensorError derives from Exception alone
        if type(fault).__name__ != "SafetensorError":
            raise
        raise DataError(f"{path} cannot be read: {fault}.", hint=hint) from fault


def _sample_count(inputs: Mapping[str, Any], source: str) -> int:
    n_samples = {name: len(array) for name, array in inputs.items()}
    if len(set(n_samples.values())) != 1:
        raise DataError(
            f"the arrays of {source} have different numbers of samples: {n_samples}.",
            hint="give every array the same first dimension",
        )
    return next(iter(n_samples.values()))


def _fitting(name: str, arrays: Mapping[str, np.ndarray], examples: Batch, source: str) -> Tensor:
    """The array as the module wants it: shape of the example but for the samples, and its dtype."""
    example = examples[name]
    if name not in arrays:
        raise DataError(
            f"{source} has no array {name}; it has {', '.join(arrays) or 'none'}.",
            hint=f"name the arrays as the model's inputs: {', '.join(examples)}",
        )
    array = arrays[name]
    if array.shape[1:] != tuple(example.shape[1:]) or array.ndim != example.ndim:
        sides = " x ".join(str(side) for side in example.shape[1:])
        raise DataError(
            f"the array {name} of {source} has the shape {array.shape}, which does not fit: the "
            f"model needs samples x {sides or 'nothing'}.",
            hint="give samples of the shape of the model's example input",
        )
    real = np.issubdtype(array.dtype, np.number) or array.dtype == np.bool_
    counted = not np.issubdtype(array.dtype, np.floating)
    if not real or (not example.is_floating_point() and not counted):
        raise DataError(
            f"the array {name} of {source} is {array.dtype}; the model needs {example.dtype}.",
            hint=f"save it as {str(example.dtype).removeprefix('torch.')}",
        )
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(example.dtype)
    if not torch.isfinite(tensor).all():
        raise DataError(
            f"the array {name} of {source} holds NaN or infinite values.",
            hint="remove the samples that are not finite",
        )
    return tensor


def _labels(
    arrays: Mapping[str, np.ndarray], slices: str | None, total: int, source: str
) -> list[str]:
    if slices is None:
        return [""] * total
    if slices not in arrays or arrays[slices].shape != (total,):
        raise DataError(
            f"{source} has no array {slices} with one label for each of {total} samples.",
            hint=f"give --slices one of its arrays: {', '.join(arrays)}",
        )
    return [str(label) for label in arrays[slices].tolist()]


def _answers(arrays: Mapping[str, np.ndarray], total: int, source: str) -> list[int]:
    found = arrays.get(ANSWERS)
    if found is None:
        return [-1] * total
    if found.shape != (total,) or not np.issubdtype(found.dtype, np.integer):
        raise DataError(
            f"the array {ANSWERS} of {source} is {found.dtype} of the shape {found.shape}.",
            hint=f"give one whole number for each of {total} samples: its true class, or -1",
        )
    return [int(answer) for answer in found]
