"""Work on several things at once, so that what is computed does not depend on how many.

The last bits of a sum depend on how one operation splits it over threads. So no operation is split:
each piece of work runs on one thread, and results are put together in the order of the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

Work = Callable[[], Result]
"""A piece of work: a function of a module with all it needs, so that it can be done elsewhere."""


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], at_once: int | None = None
) -> Iterator[Result]:
    """Do work on every item, as many at once as torch has threads; yield results in order.

    Args:
        at_once: How many instead, where `work` only waits for what is done elsewhere.

    What holds for the calling thread only (`torch.no_grad`, `sites.substituted`) does not hold
    inside `work`, which must ask for it itself.
    """
    threads = torch.get_num_threads()
    # OpenMP counts threads for each thread that asks, so each worker must be told.
    tell = torch.set_num_threads
    with (
        one_thread(),
        ThreadPoolExecutor(at_once or threads, initializer=tell, initargs=(1,)) as pool,
    ):
        yield from pool.map(work, items)


@contextmanager
def one_thread() -> Iterator[None]:
    """Do not split operations while the block runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
