"""Zero the least useful weights of every row, wherever they are; store the rest as codes.

Stored: one bit per weight that says whether it is kept, and the kept values in order of columns.
For plans written by hand: range-coded integers, whose zeros take little, lose less in equal bytes.

Source: Frantar and Alistarh 2023, SparseGPT, https://arxiv.org/abs/2301.00774 (`score: obs`, with
rounding in the same pass, section 3.5), and Sun et al. 2023, https://arxiv.org/abs/2306.11695
(`wanda`). We differ in three ways: the same number is kept in every row; kept values may be
quantized to few bits whatever the score; and scales are fitted to what compensation made of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attar.kernels import bitpack
from attar.records import Cost, Replacement, RowWeights, Unit
from attar.settings import (
    WIDTHS_AND_FLOAT,
    check_choice,
    check_fraction,
    check_group_size,
)
from attar.transform import groups, kept, sparsify


@dataclass(frozen=True)
class ZeroUnstructured:
    """Keep the same number of weights in every row and zero the others.

    Attributes:
        kept_fraction: Of each row's weights, between 0 and 1; rounded to whole weights, at least 1.
        bits: Width of a stored kept value, 2 to 8, or 16 for float16.
        group_size: Kept values that share one scale; 0 = all of a row.
        score: What chooses the kept ones: "obs", which compensates, "wanda" or "magnitude".
    """

    kept_fraction: float = 0.5
    bits: int = 4
    group_size: int = 64
    score: str = "obs"

    def __post_init__(self) -> None:
        check_fraction("zero_unstructured", "kept_fraction", self.kept_fraction)
        check_choice("zero_unstructured", "bits", self.bits, WIDTHS_AND_FLOAT, suggestion=4)
        check_group_size("zero_unstructured", self.group_size)
        sparsify.check_score("zero_unstructured", self.score)

    def label(self) -> str:
        """Name the treatment in few words."""
        part = f"{100 * self.kept_fraction:g}%"
        return kept.kept_label(part, self.bits) + sparsify.score_label(self.score)

    def rejects(self, unit: Unit) -> str | None:
        if self._n_kept(unit.columns) == unit.columns:
            return f"has {unit.columns} columns, too few to zero any at {self.kept_fraction:g} kept"
        return None

    def cost(self, unit: Unit) -> Cost:
        """Count weights that are not zero as multiply-accumulates."""
        n_kept = self._n_kept(unit.columns)
        mask_bytes = bitpack.packed_bytes(unit.n_weights, bits=1)
        value_bytes = kept.kept_bytes(unit.rows, n_kept, self.bits, self.group_size)
        return Cost(weight_bytes=mask_bytes + value_bytes, macs=unit.macs * n_kept // unit.columns)

    def apply(
        self,
        weight: Float[Tensor, "rows columns"],
        moment: Float[Tensor, "..."] | None,
        rows: RowWeights | None = None,  # noqa: ARG002
    ) -> Replacement:
        columns = weight.shape[1]
        pattern = (self._n_kept(columns), columns)
        choose_most = partial(choose, n_kept=pattern[0])
        stored = (self.bits, self.group_size)
        mask, tensors = sparsify.sparsify(weight, moment, self.score, pattern, choose_most, stored)
        tensors["mask"] = bitpack.pack(mask.flatten().view(torch.uint8), bits=1)
        return Replacement(tensors=tensors, dense=self.decode(tensors, *weight.shape))

    def decode(
        self, tensors: Mapping[str, Tensor], rows: int, columns: int
    ) -> Float[Tensor, "rows columns"]:
        n_kept = self._n_kept(columns)
        mask = groups.unpack_stored(tensors, "mask", 1, (rows, columns)).bool()
        if not bool((mask.sum(1) == n_kept).all()):
            raise groups.damaged(f"the mask does not keep {n_kept} weights in every row.")
        values = kept.load_kept(tensors, self.bits, rows, n_kept, self.group_size)
        return kept.put_back(mask, values)

    def _n_kept(self, columns: int) -> int:
        return max(1, round(self.kept_fraction * columns))


def choose(
    weight: Float[Tensor, "rows columns"],
    column_weight: Float[Tensor, "*row_groups columns"] | None,
    n_kept: int,
) -> Bool[Tensor, "rows columns"]:
    """Mark the `n_kept` weights of every row with the highest Wanda score."""
    rows, columns = weight.shape
    mask = weight.new_zeros(rows, columns, dtype=torch.bool)
    for chunk in groups.row_chunks(rows, columns):
        importance = groups.spread_rows(column_weight, rows, chunk)
        score = kept.wanda_score(weight[chunk], importance)
        mask[chunk] = mask[chunk].scatter(1, score.topk(n_kept, sorted=False).indices, True)
    return mask
