"""Places along the dimensions of parameters, and which of them can only go together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

NONE = -1  # of a place of a tensor that belongs to no parameter
# Why places go together, where others need to know.
READ, BIAS, NORM = "read", "bias", "norm"
ONE_HEAD, NORM_GROUP, CONVOLUTION_GROUP = "one head", "one group of a norm", "one group convolved"


@dataclass
class Nodes:
    """Grows while a model is traced.

    Attributes:
        labels: Of each node the least node that goes together with it; last comes NONE, so that an
            index of NONE finds NONE.
        starts: Parameter and dimension to the number of its first node, in order of first use.
        sizes: How many nodes each of those has.
        joined: Nodes that were joined, and why.
        fixed: Nodes that must stay, and why.
    """

    labels: Int[Tensor, " nodes_and_one"] = field(default_factory=lambda: torch.tensor([NONE]))
    starts: dict[tuple[str, int], int] = field(default_factory=dict)
    sizes: dict[tuple[str, int], int] = field(default_factory=dict)
    joined: list[tuple[Tensor, str]] = field(default_factory=list)
    fixed: list[tuple[Tensor, str]] = field(default_factory=list)

    def of(self, parameter: str, dim: int, size: int) -> Int[Tensor, " size"]:
        """Nodes along a dimension; the same ones whenever they are asked for."""
        key = parameter, dim
        if key not in self.starts:
            self.starts[key], self.sizes[key] = len(self.labels) - 1, size
            new = torch.arange(len(self.labels) - 1, len(self.labels) - 1 + size)
            self.labels = torch.cat([self.labels[:-1], new, self.labels[-1:]])
        return torch.arange(self.starts[key], self.starts[key] + size)

    def join(self, left: Tensor, right: Tensor, why: str) -> None:
        """Let what lies at the same place of both tensors go together."""
        left, right = (self.labels[one].flatten() for one in _without_copies(left, right))
        pairs = torch.stack([left, right])
        pairs = pairs[:, (left != right) & (left != NONE) & (right != NONE)]
        pairs = torch.unique(pairs, dim=1)
        if not pairs.numel():
            return
        ends, flat = torch.unique(pairs, return_inverse=True)
        edges = flat.numpy()
        links = coo_matrix((torch.ones(pairs.shape[1]), tuple(edges)), (len(ends), len(ends)))
        component = torch.from_numpy(connected_components(links, directed=False)[1]).long()
        least = torch.full((int(component.max()) + 1,), len(self.labels))
        least = least.scatter_reduce(0, component, ends, "amin")
        into = torch.arange(len(self.labels))
        into[ends] = least[component]
        into[-1] = NONE
        self.labels = into[self.labels]
        self.joined.append((least.clone(), why))

    def hold(self, places: Tensor, dim: int, why: str) -> None:
        """Let all that lies along a dimension go together, for each place along the others."""
        if self.varies(places, dim):
            self.fix_where(places, self._half_known(places, dim), why)
            self.join(places, places.narrow(dim, 0, 1).expand_as(places), why)

    def _half_known(self, places: Tensor, dim: int) -> Tensor:
        return (places == NONE).any(dim, keepdim=True).expand_as(places)

    def varies(self, places: Tensor, dim: int) -> bool:
        """Say whether different things lie along a dimension."""
        if places.shape[dim] < 2 or places.stride(dim) == 0:
            return False
        found = self.labels[places]
        return bool((found != found.narrow(dim, 0, 1)).any())

    def fix(self, places: Tensor, why: str) -> None:
        """Let nothing of this go."""
        known: Tensor = torch.unique(places[places != NONE])
        if len(known):
            self.fixed.append((known, why))

    def fix_where(self, places: Tensor, mask: Tensor, why: str) -> None:
        """Let nothing go where the mask says so."""
        if bool(mask.any()):
            self.fix(places[mask], why)


def _without_copies(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out what is a mere repetition of memory in both."""
    for dim in range(left.dim()):
        alike = all(one.shape[dim] > 1 and one.stride(dim) == 0 for one in (left, right))
        if alike:
            left, right = left.narrow(dim, 0, 1), right.narrow(dim, 0, 1)
    return left, right
