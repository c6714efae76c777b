"""Files that are made piece by piece while they are written, so that none is whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attar.disk import give_back

Piece = bytes | memoryview


@dataclass(frozen=True)
class Pieces:
    """A file's content: how long it is, and how to make it.

    Attributes:
        n_bytes: Of all pieces together.
        make: Gives the pieces in order; may be called again. A piece may be used until the next.
    """

    n_bytes: int
    make: Callable[[], Iterable[Piece]]

    def __len__(self) -> int:
        return self.n_bytes

    def __bytes__(self) -> bytes:
        return b"".join(self.make())


Content = bytes | Pieces


def pieces_of(content: Content) -> Iterable[Piece]:
    """Give the content piece by piece."""
    return content.make() if isinstance(content, Pieces) else (content,)


def tensor_bytes(tensors: Iterable[Tensor], alignment: int = 1) -> Iterator[Piece]:
    """Give the bytes of each tensor, with zeros behind it up to a multiple of `alignment`."""
    for tensor in tensors:
        whole = tensor.contiguous()
        yield whole.view(-1).view(torch.uint8).numpy().data
        give_back(whole)
        if whole.nbytes % alignment:
            yield bytes(-whole.nbytes % alignment)
