"""Keep n_kept of every m consecutive columns and zero the others; store the rest as codes.

Stored: for every m columns the number of their pattern in the list of all patterns, in
ceil(log2(C(m, n_kept))) bits (2:4 has 6 patterns: 3 bits), and the kept values in order of columns.

For plans written by hand: range-coded integers, whose zeros take little, lose less in equal bytes.

Source: Mishra et al. 2021, https://arxiv.org/abs/2104.08378 (2:4), with the score of SparseGPT
(Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774, section 3.4), of Wanda or of size. We
differ in two ways: patterns are numbered instead of storing positions, and the kept values may be
quantized to few bits whatever the score.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from math import comb

import torch
from jaxtyping import Bool, Float, Float32, UInt8
from torch import Tensor

from attar.kernels import bitpack
from attar.records import Cost, Replacement, RowWeights, Unit
from attar.settings import WIDTHS_AND_FLOAT, check_choice, check_group_size
from attar.transform import groups, kept, sparsify


@dataclass(frozen=True)
class ZeroNM:
    """Keep `n_kept` non-zeros in every `m` consecutive columns (2:4 keeps 2).

    Attributes:
        n_kept: 1 to m - 1.
        m: 2 to 8.
        bits: Width of a stored kept value, 2 to 8, or 16 for float16.
        group_size: Kept values that share one scale; 0 = all of a row.
        score: What chooses the kept ones: "obs", which compensates, "wanda" or "magnitude".
    """

    n_kept: int = 2
    m: int = 4
    bits: int = 4
    group_size: int = 64
    score: str = "obs"

    def __post_init__(self) -> None:
        check_choice("zero_n_m", "m", self.m, range(2, 9), suggestion=4)
        check_choice("zero_n_m", "n_kept", self.n_kept, range(1, self.m), suggestion=self.m // 2)
        check_choice("zero_n_m", "bits", self.bits, WIDTHS_AND_FLOAT, suggestion=4)
        check_group_size("zero_n_m", self.group_size)
        sparsify.check_score("zero_n_m", self.score)

    def label(self) -> str:
        """Name the treatment in few words."""
        part = f"{self.n_kept}:{self.m}"
        return kept.kept_label(part, self.bits) + sparsify.score_label(self.score)

    def rejects(self, unit: Unit) -> str | None:
        if unit.columns % self.m:
            return f"has {unit.columns} columns, which is not a multiple of m {self.m}"
        return None

    def cost(self, unit: Unit) -> Cost:
        """Count weights that are not zero as multiply-accumulates."""
        n_patterns = unit.n_weights // self.m
        pattern_bytes = bitpack.packed_bytes(n_patterns, self._pattern_bits)
        n_kept = unit.columns // self.m * self.n_kept
        value_bytes = kept.kept_bytes(unit.rows, n_kept, self.bits, self.group_size)
        return Cost(
            weight_bytes=pattern_bytes + value_bytes, macs=unit.macs * self.n_kept // self.m
        )

    def apply(
        self,
        weight: Float[Tensor, "rows columns"],
        moment: Float[Tensor, "..."] | None,
        rows: RowWeights | None = None,  # noqa: ARG002
    ) -> Replacement:
        pattern = (self.n_kept, self.m)
        choose_most = partial(choose, n_kept=self.n_kept, m=self.m)
        stored = (self.bits, self.group_size)
        mask, tensors = sparsify.sparsify(weight, moment, self.score, pattern, choose_most, stored)
        numbers = number_patterns(mask.view(-1, self.m), self.n_kept)
        tensors["patterns"] = bitpack.pack(numbers, self._pattern_bits)
        return Replacement(tensors=tensors, dense=self.decode(tensors, *weight.shape))

    def decode(
        self, tensors: Mapping[str, Tensor], rows: int, columns: int
    ) -> Float[Tensor, "rows columns"]:
        per_row = columns // self.m
        numbers = groups.unpack_stored(tensors, "patterns", self._pattern_bits, (rows, per_row))
        if int(numbers.max()) >= comb(self.m, self.n_kept):
            raise groups.damaged(f"a pattern number is not one of {self.n_kept}:{self.m}.")
        mask = list_patterns(self.n_kept, self.m)[numbers.flatten().int()].view(rows, columns)
        n_kept = per_row * self.n_kept
        return kept.put_back(
            mask, kept.load_kept(tensors, self.bits, rows, n_kept, self.group_size)
        )

    @property
    def _pattern_bits(self) -> int:
        return (comb(self.m, self.n_kept) - 1).bit_length()


def list_patterns(n_kept: int, m: int) -> Bool[Tensor, "patterns m"]:
    """List every way to keep `n_kept` of `m`, in lexicographic order of the kept positions."""
    return torch.tensor(
        [[column in chosen for column in range(m)] for chosen in combinations(range(m), n_kept)]
    )


def number_patterns(mask: Bool[Tensor, "n m"], n_kept: int) -> UInt8[Tensor, " n"]:
    """Find the number of each pattern in `list_patterns`."""
    m = mask.shape[1]
    places = 2 ** torch.arange(m)
    table = torch.zeros(2**m, dtype=torch.uint8)
    patterns = list_patterns(n_kept, m)
    table[(patterns * places).sum(1)] = torch.arange(len(patterns)).to(torch.uint8)
    key = torch.zeros(len(mask), dtype=torch.int32)
    for column in range(m):
        key += mask[:, column].int() << column
    return table[key]


def choose(
    weight: Float[Tensor, "rows columns"],
    column_weight: Float[Tensor, "*row_groups columns"] | None,
    n_kept: int,
    m: int,
) -> Bool[Tensor, "rows columns"]:
    """Mark the `n_kept` of every `m` columns with the highest Wanda score, the first of equals."""
    rows, columns = weight.shape
    mask = weight.new_empty(rows, columns, dtype=torch.bool)
    for chunk in groups.row_chunks(rows, columns):
        importance = groups.spread_rows(column_weight, rows, chunk)
        score = kept.wanda_score(weight[chunk], importance)
        rank = _ranks(score.reshape(-1, m).T.contiguous())
        mask[chunk] = (rank < n_kept).T.reshape(-1, columns)
    return mask


def _ranks(score: Float32[Tensor, "m n"]) -> UInt8[Tensor, "m n"]:
    """Count for each score how many of its column beat it."""
    rank = torch.zeros(score.shape, dtype=torch.uint8, device=score.device)
    for first, second in combinations(range(len(score)), 2):
        wins = score[first] >= score[second]
        rank[second] += wins
        rank[first] += ~wins
    return rank
