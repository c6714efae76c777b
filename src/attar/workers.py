"""Pieces of work in other processes, here or on other machines, over Ray.

A worker does one piece at a time on one torch thread, as `parallel.in_order` does, and results are
put together in the order of the pieces: so the bytes are those of a run without workers. A piece
holds the weight and the statistics of one unit; the model itself is never sent.

Ray would do a lost piece again by itself, but one that takes more memory than there is for ever.
So it is told not to, and a lost piece is counted, said and done again here.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from attar.environment import environment
from attar.errors import AttarError, WorkerError
from attar.memory import use_little
from attar.parallel import Work, one_thread

# Pieces on their way for each worker: the next is there when one is done.
PIECES_FOR_EACH = 2
# A piece is given up when this many workers were lost over it.
MOST_LOST = 4
# Of the object store of a Ray that is started here, for each worker: pieces on their way. A large
# weight of 32 bits with its statistics takes a quarter of it; what does not fit goes to disk.
STORE_BYTES_FOR_EACH = 2**30
# In which a machine takes a connection, if it is there.
ANSWER_SECONDS = 10.0

Result = TypeVar("Result")
Answer = tuple[Any, AttarError | None]


@dataclass(frozen=True)
class Workers:
    """Workers that were joined.

    Attributes:
        count: Pieces that are done at once.
    """

    count: int

    @property
    def at_once(self) -> int:
        """Pieces that are on their way at once."""
        return PIECES_FOR_EACH * self.count

    def do(self, work: Work[Result], what: str, tell: Callable[[str], None]) -> Result:
        """Have a piece done; again where the worker is lost.

        Args:
            what: The piece, for people.
            tell: Is given a line for each worker that is lost.

        Raises:
            WorkerError: The worker has another version of what computes, or too little memory, or
                too many were lost.
            AttarError: Of the piece itself; it is not done again then.
        """
        import ray
        from ray import exceptions

        gone = (
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
            exceptions.ObjectLostError,
        )
        for _ in range(MOST_LOST):
            try:
                result, error = ray.get(_remote().remote(work, environment()))
            except exceptions.OutOfMemoryError as full:
                raise WorkerError(
                    f"a worker had too little memory for the {what}.",
                    hint="use fewer workers on one machine, or machines with more memory.",
                ) from full
            except exceptions.RaySystemError as broken:
                raise WorkerError(
                    f"a worker cannot do the {what}: {str(broken).strip().splitlines()[-1]}.",
                    hint="install the same version of attar on every machine.",
                ) from broken
            except gone:
                tell(f"a worker was lost; the {what} is done again")
                continue
            if error is not None:
                raise error
            done: Result = result
            return done
        raise WorkerError(
            f"{MOST_LOST} workers were lost over the {what}.",
            hint="see why in Ray's logs; often there is too little memory for so many workers.",
        )


def start(wanted: str) -> Workers | None:
    """Start workers on this machine, or join those of a running Ray; none for "".

    A Ray that this process has joined already is taken as it is.

    Args:
        wanted: A number of workers to start, or the address of a Ray: "ray://host:10001",
            "host:6379", or "auto" for the one that runs on this machine.

    Raises:
        WorkerError: Ray is not installed, cannot be reached, or has no processor to give.
    """
    if not wanted:
        return None
    settings = _settings(wanted)
    try:
        import ray
    except ModuleNotFoundError as error:
        raise WorkerError(
            "workers need the package ray, which is not installed.",
            hint="pip install 'attar[workers]', or leave --workers out.",
        ) from error
    if not ray.is_initialized():
        # No network is asked, and nothing is told to those who make Ray.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            with _own_signals():
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
        except (OSError, RuntimeError, ValueError) as error:
            raise WorkerError(
                f"no workers at {wanted}: {str(error).strip().splitlines()[0]}",
                hint="see that Ray runs there in the same version (ray status), or --workers 2.",
            ) from error
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    count = int(resources.get("CPU", 0))
    if count < 1:
        raise WorkerError(
            f"the Ray at {wanted} has no processor to give.",
            hint="join machines to it: ray start --address HOST:PORT",
        )
    return Workers(count)


def _settings(wanted: str) -> dict[str, Any]:
    """Turn what was typed into arguments of `ray.init`."""
    if not wanted.isdecimal():
        if wanted != "auto" and ":" not in wanted:
            raise WorkerError(
                f"{wanted!r} is neither a number of workers nor the address of a Ray.",
                hint="write --workers 2 or --workers ray://HOST:10001",
            )
        return {"address": wanted if wanted == "auto" else _reachable(wanted)}
    count = int(wanted)
    if count < 1:
        raise WorkerError("there is no work without workers.", hint="write --workers 1 or more.")
    return {
        "address": "local",
        "num_cpus": count,
        "include_dashboard": False,
        "object_store_memory": count * STORE_BYTES_FOR_EACH,
    }


def _reachable(address: str) -> str:
    """Refuse an address where nobody answers at once; Ray would try for minutes."""
    place = urlsplit(address if "://" in address else f"//{address}")
    try:
        socket.create_connection((place.hostname, place.port), ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:
        raise WorkerError(
            f"nobody answers at {address}: {error}.",
            hint="start Ray there (ray start --head), or write --workers 2.",
        ) from error
    return address


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what this process does when it is told to end; Ray would put its own in place."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@cache
def _remote() -> Any:
    import ray

    # Ray says so when a worker was lost, and `Workers.do` has it done again.
    return ray.remote(max_retries=0, num_cpus=1)(_answer)


def _answer(work: Work[Any], expected: dict[str, str]) -> Answer:
    """Do a piece in a worker. An error a user can meet is an answer, which Ray hands on whole."""
    for name, here in environment().items():
        if here != expected[name]:
            return None, WorkerError(
                f"a worker on {platform.node()} has {name} {here}, and this machine "
                f"{expected[name]}: the bytes would differ.",
                hint="give all machines the same versions and kind of processor.",
            )
    use_little()
    try:
        with one_thread():
            return work(), None
    except AttarError as error:
        return None, error
