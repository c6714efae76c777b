"""Integer codes, and a product of two thin matrices that makes good what rounding lost most.

    weight = codes, as in `quantize_feedback`, + left · right

Source: Yao et al. 2023, ZeroQuant-V2, https://arxiv.org/abs/2303.08302, section 5 (low-rank
compensation: the truncated singular value decomposition of the rounding error). We differ in three
ways. The error is decomposed after it is multiplied with the roots of R's diagonal and of C, so
that what is kept is what costs most nats, not most weight (Eckart and Young 1936 holds for that
norm). Rounding has fed its errors forward before, which leaves less to make good. And both matrices
are stored in float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from attar import settings
from attar.errors import SettingError
from attar.records import Cost, Replacement, RowWeights, Unit
from attar.transform import groups
from attar.transform.quantize_feedback import QuantizeFeedback

FLOAT_BYTES = 2
# Added to the diagonal of C, as a share of its mean, before its root is taken and inverted.
DAMPING_FRACTION = 0.01


@dataclass(frozen=True)
class QuantizeLowRank:
    """Store each weight as an integer, with a correction of low rank.

    Attributes:
        bits: Width of a stored weight, 2 to 8.
        group_size: Columns that share one scale and zero point; 0 = the whole row.
        rank: Columns of the left matrix, and rows of the right one.
    """

    bits: int = 4
    group_size: int = 64
    rank: int = 8

    def __post_init__(self) -> None:
        settings.check_choice("quantize_low_rank", "bits", self.bits, settings.WIDTHS, 4)
        settings.check_group_size("quantize_low_rank", self.group_size)
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise SettingError(
                f"rank is {self.rank!r}, but quantize_low_rank takes a whole number above 0.",
                hint="set rank to 8.",
            )

    def label(self) -> str:
        """Say the setting in words for a report."""
        return f"{self._codes.label()}, rank {self.rank}"

    @property
    def _codes(self) -> QuantizeFeedback:
        return QuantizeFeedback(self.bits, self.group_size)

    def rejects(self, unit: Unit) -> str | None:
        if unit.groups > 1:
            return "is a convolution in groups, whose rows do not share columns"
        if self.rank * (unit.rows + unit.columns) >= unit.n_weights:
            return f"is as small as a product of rank {self.rank}"
        return self._codes.rejects(unit)

    def cost(self, unit: Unit) -> Cost:
        """Multiply-accumulates stay: the product is added to the weight when that is decoded."""
        plain = self._codes.cost(unit)
        thin = FLOAT_BYTES * self.rank * (unit.rows + unit.columns)
        return replace(plain, weight_bytes=plain.weight_bytes + thin)

    def apply(
        self, weight: Tensor, moment: Tensor | None, rows: RowWeights | None = None
    ) -> Replacement:
        made = self._codes.apply(weight, moment, rows)
        left, right = _low_rank(weight - made.dense, moment, rows, self.rank)
        limit = groups.LARGEST_SCALE
        if not max(float(left.abs().max()), float(right.abs().max())) <= limit:
            raise SettingError(
                "the correction is outside the range of float16.",
                hint="keep this unit in 32 bits, or round it without a correction.",
            )
        tensors = {
            **made.tensors,
            "left": left.half().contiguous(),
            "right": right.half().contiguous(),
        }
        return Replacement(tensors, self.decode(tensors, *weight.shape))

    def decode(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        codes = {name: t for name, t in tensors.items() if name not in ("left", "right")}
        dense = self._codes.decode(codes, rows, columns)
        left = groups.take_stored(tensors, "left", torch.float16, (rows, self.rank)).float()
        right = groups.take_stored(tensors, "right", torch.float16, (self.rank, columns)).float()
        if not bool(left.isfinite().all() and right.isfinite().all()):
            raise groups.damaged("a stored correction is not a number.")
        # One rank after the other: the order of these sums never depends on the machine's threads.
        for one, two in zip(left.T, right, strict=True):
            dense.addr_(one, two)
        return dense


def _low_rank(
    error: Float[Tensor, "rows columns"],
    moment: Tensor | None,
    rows: RowWeights | None,
    rank: int,
) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank columns"]]:
    """Best product of this rank in the norm trace(diag(R) E C Eᵀ)."""
    root, inverse = _root(moment, error.shape[1])
    share = torch.ones(len(error)) if rows is None else rows.importance
    floor = 1e-6 * share.mean().clamp(min=1e-30)
    scale = share.clamp(min=float(floor)).double().sqrt()[:, None]
    scaled = scale * error.double() @ root
    # Vectors of the smaller side are enough: the other factor is what is left when they are taken.
    if len(error) <= error.shape[1]:
        basis = torch.linalg.eigh(scaled @ scaled.T).eigenvectors[:, -rank:]
        left, right = basis / scale, basis.T @ scaled @ inverse
    else:
        basis = torch.linalg.eigh(scaled.T @ scaled).eigenvectors[:, -rank:]
        left, right = scaled @ basis / scale, basis.T @ inverse
    # Of the same size, so that neither leaves float16.
    size = (left.norm(dim=0) / right.norm(dim=1).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    return (left / size).float(), (right * size[:, None]).float()


def _root(
    moment: Tensor | None, columns: int
) -> tuple[Float[Tensor, "columns columns"], Float[Tensor, "columns columns"]]:
    """A root of C, and its inverse."""
    one = torch.eye(columns, dtype=torch.float64)
    if moment is None or not bool((moment != 0).any()):
        return one, one
    exact = torch.diag(moment.double()) if moment.dim() == 1 else moment[0].double()
    damped = exact + DAMPING_FRACTION * exact.diagonal().mean() * one
    root = torch.linalg.cholesky(damped)
    return root, torch.linalg.solve_triangular(root, one, upper=False)
