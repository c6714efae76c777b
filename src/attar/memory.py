"""Peak memory of the process: what it was, and what it will be."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from attar.disk import DiskWeight, give_all_back, lies_on_disk
from attar.records import Batch, Model, Units

FLOAT_BYTES = 4
# Where Linux says what a container may use, in the new and in the old way.
CONTROL_GROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
# Options of glibc's malloc.h. Mapping and filling a buffer with zeros costs more than reusing one,
# so only large ones are.
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
MAPPED_FROM_BYTES = 4 * 2**20
# Where weights lie on disk, what waits for the way back goes there at once; what then lies between
# the freed buffers would keep them from being used again.
MAPPED_FROM_BYTES_ON_DISK = 2**18
# Copies of one batch's outputs alive at once: logits, their gradient, probabilities, a temporary.
OUTPUT_COPIES = 5
# Settings priced at once on one weight, and buffers of each (codes, scales spread, errors).
PRICED_COPIES = 24
# Copies of the largest weight, in float32, while it is rounded and range coded: itself, what it
# decodes to, the change, and codes of two settings.
TREATED_COPIES = 5
# For each number that learns: what is learned, Adam's two, the step of its grid, where it started,
# the best so far and what a look keeps (26); two copies of the model (8); and of two passes what
# weights become (24) with their gradients and the sum (12).
LEARNED_BYTES = 70
# What the allocator keeps of memory that was freed, as a share of what comes and goes.
ALLOCATOR_SLACK = 1.25


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def resident_bytes() -> int:
    """Resident size now; the peak where the system does not say."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_bytes()
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def machine_bytes() -> int | None:
    """Memory that this process may use; None where the system does not say."""
    known = []
    with suppress(ValueError, OSError, AttributeError):  # no such names on this system
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in CONTROL_GROUP_LIMITS:
        with suppress(ValueError, OSError):  # no such file, or "max"
            known.append(int(limit.read_text()))
    return min((size for size in known if size > 0), default=None)


def use_little(*, on_disk: bool = False) -> None:
    """Ask the C library (glibc) for fewer holes, before the heavy part starts.

    Threads share two heaps, and a large buffer is mapped alone, so that it goes back when freed.

    Args:
        on_disk: Whether the weights of the model lie on disk.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(M_ARENA_MAX, 2)
        set_option(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES_ON_DISK if on_disk else MAPPED_FROM_BYTES)


def release() -> None:
    """Give memory that was freed back to the system, where the C library has a way to (glibc).

    So is that in which mapped files were read, which can be read again.
    Buffers of many sizes leave holes between what stays; over a run these add up to a gigabyte.
    """
    give_all_back()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def saved_bytes(model: Model, examples: Batch) -> int:
    """Bytes that a backward pass keeps of one forward pass over `examples`."""
    seen: dict[int, int] = {}
    weights = {
        p.untyped_storage().data_ptr()
        for p in model.module.parameters()
        if not isinstance(p, DiskWeight)
    }
    kept: list[Tensor] = []  # a freed storage's address could be given to another

    def pack(tensor: Tensor) -> Tensor:
        if isinstance(tensor, DiskWeight):
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    batch = {
        n: t.clone().requires_grad_() if t.is_floating_point() else t for n, t in examples.items()
    }
    embedding = next(model.module.parameters())
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        embedding.requires_grad_()
        model.task.forward(model.module, batch)
        embedding.requires_grad_(False)
    return sum(seen.values())


def forecast(
    model: Model,
    units: Units,
    batches: Sequence[Batch],
    *,
    samples_at_once: int,
    statistics_bytes: int,
    priced_weights_at_once: int,
    learns: bool = False,
) -> int:
    """Say the peak of the whole run before it starts, from shapes and one small forward pass.

    Statistics are there throughout; on top of them comes the larger of one backward pass and the
    pricing of the largest weight. What is made learns, where it does, when they are gone. Where the
    weights lie on disk, so do statistics, codes, and what waits for the way back; a pass then reads
    one weight at a time.
    """
    samples = len(next(iter(model.examples.values())))
    batch = batches[0]
    scale = 1.0
    for name, tensor in batch.items():
        scale = max(scale, tensor[:1].numel() * samples / model.examples[name].numel())
    saved = saved_bytes(model, model.examples) / samples * scale * samples_at_once
    if model.task.name != "language":
        saved *= 2  # the hooks keep a copy of every output, about as much again
    with torch.no_grad():
        outputs = model.task.forward(model.module, model.examples).numel() / samples * scale
    outputs *= samples_at_once * FLOAT_BYTES * OUTPUT_COPIES
    largest = max(u.n_weights for u in units) * FLOAT_BYTES
    priced = min(largest, priced_weights_at_once * FLOAT_BYTES) * PRICED_COPIES
    release()  # the small pass
    if lies_on_disk(model.module):
        passing = max(samples_at_once * largest + outputs, TREATED_COPIES * largest, priced)
        return int(resident_bytes() + ALLOCATOR_SLACK * passing)
    passing = max(saved + outputs, priced)
    stored = sum(unit.n_weights for unit in units)  # packed codes, at most a byte each
    planned = statistics_bytes + stored + ALLOCATOR_SLACK * passing
    learned = ALLOCATOR_SLACK * (saved + outputs) + LEARNED_BYTES * stored if learns else 0
    return int(resident_bytes() + max(planned, learned))
