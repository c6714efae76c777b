"""A product of two thin matrices in place of a weight, each rounded with error feedback.

    weight = leftᵀ · diag(middle) · right        left: rank rows, right: rank columns

The product is the one of its rank whose change of the weight, dW, has the least
trace(R dW C dWᵀ): with roots of R and C, C = L꜀ L꜀ᵀ, the truncated singular value decomposition of
Lᵣᵀ W L꜀ (Eckart and Young 1936 holds for that norm), multiplied with their inverses. Both factors
hold each component times its singular value, `middle` one over it: then an error in any component
of either factor costs the same, and one step serves all, so that range coding gives strong
components more bits. The right factor is rounded first. The left one is then fitted to what the
right one has become, and rounded by how its own errors count: columns of it are rows of the weight,
and hang together by R.

Where it pays: queries and keys of transformers below two bits per weight, and most maps below one;
an embedding's rank is priced by how often its tokens occur, which R holds. Attar's own folder is
read back to the whole weight, so that only the file is smaller. With `bits: 16`, `--to onnx` writes
two products, and the engine also computes less (`export/onnx_factors.py`): what `cost` counts.

Source: the norm is that of SVD-LLM (Wang et al. 2024, https://arxiv.org/abs/2403.07378, section
3.1), which whitens by C alone; with R on the other side it is the price. `minimise: outputs` is
atomic feature mimicking (Yu et al. 2024, Unified Low-rank Compression Framework for Click-through
Rate Prediction, https://arxiv.org/abs/2405.18146, section 3: the principal components of a layer's
output, W = U Uᵀ W, U leading eigenvectors of E[y yᵀ] = W C Wᵀ), and `minimise: weights` the plain
decomposition that PELA (Guo et al. 2023, https://arxiv.org/abs/2310.10700, section 3.1) starts
from. We differ in that all are rounded, and in that C counts each input by the gradient that
answers it. The factors of an embedding are those of ALBERT (Lan et al. 2020,
https://arxiv.org/abs/1909.11942, section 3.1), fitted to a table that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from attar import settings
from attar.errors import SettingError
from attar.records import Cost, Replacement, RowWeights, Transform, Unit
from attar.transform import groups
from attar.transform.keep_float import KeepFloat
from attar.transform.quantize_entropy import QuantizeEntropy
from attar.transform.quantize_feedback import QuantizeFeedback

NORMS = ("price", "outputs", "weights")
FLOAT_BYTES = 4  # of a number of `middle`
MOST_CODED_BITS = 7
# Numbers of a factor that range coding learns enough from: fewer than of a weight, because one
# scale for each component is worse for factors than for weights.
FEWEST_CODED = 4096
# Added to the diagonals of C and R, as a share of their means, before their roots are taken.
COLUMN_DAMPING, ROW_DAMPING = 0.01, 0.1
# Importance of a row alone is taken to be at least this share of the mean.
SMALLEST_SHARE = 1 / 256


@dataclass(frozen=True)
class FactorizeLowRank:
    """Store a weight as two thin matrices.

    Attributes:
        rank: Rows of each factor.
        bits: Bits of each number in a factor, on average, 1 to 8, or 16 for float16. Factors too
            small for range coding take whole bits from 2 on.
        minimise: What the factors keep best: "price", "outputs" of the layer, or "weights".
    """

    rank: int = 8
    bits: int | float = 3
    minimise: str = "price"

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise SettingError(
                f"rank is {self.rank!r}, but factorize_low_rank takes a whole number above 0.",
                hint="set rank to 8.",
            )
        if self.bits != KeepFloat.bits:
            settings.check_between("factorize_low_rank", "bits", self.bits, 1, 8, 3)
        if self.minimise not in NORMS:
            raise SettingError(
                f"minimise is {self.minimise!r}, but factorize_low_rank takes one of "
                f"{', '.join(NORMS)}.",
                hint="set minimise to price.",
            )

    def label(self) -> str:
        """Say the setting in words for a report."""
        how = "" if self.minimise == "price" else f", by {self.minimise}"
        width = "float16" if self.bits == KeepFloat.bits else f"{self.bits:g} bits"
        return f"rank {self.rank}, factors in {width}{how}"

    def rejects(self, unit: Unit) -> str | None:
        if unit.groups > 1:
            return "is a convolution in groups, whose rows do not share columns"
        if self.rank * (unit.rows + unit.columns) >= unit.n_weights:
            return f"is as small as a product of rank {self.rank}"
        for side in (unit.rows, unit.columns):
            if self._of_factor(side) is None:
                return f"has a factor too small to be coded in {self.bits:g} bits"
        return None

    def cost(self, unit: Unit) -> Cost:
        """Count the two products that take the place of one."""
        sides = (unit.rows, unit.columns)
        factors = sum(
            self._factor(side).cost(_as_unit(self.rank, side)).weight_bytes for side in sides
        )
        macs = unit.macs * self.rank * sum(sides) // unit.n_weights
        return Cost(weight_bytes=factors + FLOAT_BYTES * self.rank, macs=macs)

    def apply(
        self, weight: Tensor, moment: Tensor | None, rows: RowWeights | None = None
    ) -> Replacement:
        return self.made(decompose(weight, moment, rows, self.minimise))

    def decode(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        return self.product(tensors, rows, columns).dense()

    def product(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Product:
        """Decode the factors."""
        middle = groups.take_stored(tensors, "middle", torch.float32, (self.rank,))
        left, right = (
            self._factor(side).decode(_under(tensors, name), self.rank, side)
            for name, side in (("left", rows), ("right", columns))
        )
        if not all(bool(part.isfinite().all()) for part in (left, middle, right)):
            raise groups.damaged("a stored factor is not a number.")
        return Product(left, middle, right)

    def made(self, best: Decomposition) -> Replacement:
        """Round both factors of a decomposed weight, the second to what the first has become."""
        kept = best.of_rank(self.rank)
        size = float(kept.right.square().mean().sqrt()) or 1.0
        right = self._factor(kept.right.shape[1]).apply(
            _made_whole(kept.right / size), best.columns
        )
        middle = torch.where(kept.values > 0, size / kept.values, 0.0)
        left = best.fitted(middle[:, None] * right.dense.double())
        left_size = float(left.square().mean().sqrt()) or 1.0
        stored = self._factor(left.shape[1]).apply(_made_whole(left / left_size), best.rows)
        tensors = {
            **{f"left_{name}": tensor for name, tensor in stored.tensors.items()},
            **{f"right_{name}": tensor for name, tensor in right.tensors.items()},
            "middle": (middle * left_size).float(),
        }
        product = Product(stored.dense, tensors["middle"], right.dense)
        return Replacement(tensors, product.dense(), product)

    def _factor(self, side: int) -> Transform:
        found = self._of_factor(side)
        assert found is not None
        return found

    def _of_factor(self, side: int) -> Transform | None:
        """How a factor is stored, `rank side`; None where it cannot be."""
        if self.bits == KeepFloat.bits:
            return KeepFloat()
        if self.bits <= MOST_CODED_BITS and self.rank * side >= FEWEST_CODED:
            return QuantizeEntropy(self.bits)
        if self.bits != int(self.bits) or self.bits < min(settings.WIDTHS):
            return None
        return QuantizeFeedback(int(self.bits), group_size=0)


@dataclass(frozen=True)
class Product:
    """Two factors, and what each component is multiplied with between them.

    Attributes:
        left: `rank rows`.
        middle: `rank`.
        right: `rank columns`.
    """

    left: Float32[Tensor, "rank rows"]
    middle: Float32[Tensor, " rank"]
    right: Float32[Tensor, "rank columns"]

    def dense(self) -> Float32[Tensor, "rows columns"]:
        """Multiply out, in float64, so that the order of sums does not show in float32."""
        scaled = self.middle.double()[:, None] * self.right.double()
        dense = torch.empty(self.left.shape[1], self.right.shape[1])
        for rows in groups.row_chunks(*dense.shape):
            dense[rows] = self.left[:, rows].double().T @ scaled
        return dense

    def moved(self, move: Callable[[Tensor], Tensor]) -> Product:
        """The same with the factors where `move` puts them."""
        return Product(move(self.left), self.middle, move(self.right))


@dataclass(frozen=True)
class Decomposition:
    """A weight's components in a norm, strongest first.

    Attributes:
        weight: `rows columns`.
        values: Singular values.
        right: Of each component, times its singular value, `components columns`.
        columns: C as the rounding of right factors is told.
        rows: R as the rounding of left factors is told.
    """

    weight: Float[Tensor, "rows columns"]
    values: Float64[Tensor, " components"]
    right: Float64[Tensor, "components columns"]
    columns: Tensor | None
    rows: Tensor | None

    def of_rank(self, rank: int) -> Decomposition:
        """The strongest components."""
        return replace(self, values=self.values[:rank], right=self.right[:rank])

    def fitted(self, right: Float64[Tensor, "rank columns"]) -> Float64[Tensor, "rank rows"]:
        """The left factor of the least damage beside this right one, whatever R is."""
        through = right if self.columns is None else _times(right, self.columns)
        among = through @ right.T
        among.diagonal().add_(1e-9 * among.diagonal().mean().clamp(min=1e-300))
        solved = torch.linalg.lu_factor(among)
        left = torch.empty(len(right), len(self.weight), dtype=torch.float64)
        for rows in groups.row_chunks(*self.weight.shape):
            part = self.weight[rows]
            left[:, rows] = torch.linalg.lu_solve(*solved, through @ part.double().T)
            left[:, rows].masked_fill_((part == 0).all(1), 0.0)
        return left


def factorize_all(
    weight: Float[Tensor, "rows columns"],
    moment: Tensor | None,
    transforms: Sequence[FactorizeLowRank],
    rows: RowWeights | None = None,
) -> Iterator[Replacement | SettingError]:
    """Apply several settings to one weight, which is decomposed once in each norm.

    What the values do not allow gives its error in place of a replacement.
    """
    known: dict[str, Decomposition] = {}
    for one in transforms:
        if one.minimise not in known:
            known[one.minimise] = decompose(weight, moment, rows, one.minimise)
        try:
            yield one.made(known[one.minimise])
        except SettingError as error:
            yield error


def decompose(
    weight: Float[Tensor, "rows columns"],
    moment: Tensor | None,
    rows: RowWeights | None,
    minimise: str,
) -> Decomposition:
    """Find the components of a weight in the norm of R and C, of C alone, or of neither."""
    column_side, row_side = _damped_columns(moment), _damped_rows(rows)
    root = _root(column_side if minimise != "weights" else None, weight.shape[1])
    row_root = _root(row_side if minimise == "price" else None, len(weight))
    # Vectors of the smaller side are enough: the other ones are what is left when they are taken.
    if len(weight) <= weight.shape[1]:
        whitened = _whitened(weight, slice(None), root, row_root)
        power, basis = torch.linalg.eigh(whitened @ whitened.T)
        right = basis.T @ whitened
    else:
        power, right = torch.linalg.eigh(_among_columns(weight, root, row_root))
        right = right.T
    values, right = power.flip(0).clamp(min=0).sqrt(), right.flip(0)
    right = values[:, None] * right / right.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return Decomposition(weight, values, _divided(right, root), column_side, row_side)


def _whitened(
    weight: Tensor, rows: slice, root: Tensor, row_root: Tensor
) -> Float64[Tensor, "..."]:
    """Lᵣᵀ W L꜀, of some rows where rows are independent, else of all."""
    part = _times(weight[rows].double(), root)
    whitened: Tensor = row_root[rows, None] * part if row_root.dim() == 1 else row_root.T @ part
    return whitened


def _among_columns(
    weight: Tensor, root: Tensor, row_root: Tensor
) -> Float64[Tensor, "columns columns"]:
    """Products of whitened columns with each other, a few rows at a time where rows are apart."""
    total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    chunks = groups.row_chunks(*weight.shape) if row_root.dim() == 1 else [slice(None)]
    for rows in chunks:
        part = _whitened(weight, rows, root, row_root)
        total += part.T @ part
    return total


def _times(part: Tensor, side: Tensor) -> Tensor:
    """Multiply rows by a matrix, or by one that has a diagonal only, or by the first of a group."""
    if side.dim() == 1:
        return part * side
    product: Tensor = part @ (side[0] if side.dim() == 3 else side)
    return product


def _damped_columns(moment: Tensor | None) -> Float64[Tensor, "..."] | None:
    """C with a ridge; None where nothing is known."""
    if moment is None or not bool((moment != 0).any()):
        return None
    exact = moment.double()
    if exact.dim() == 1:
        return exact + COLUMN_DAMPING * exact.mean()
    return exact + COLUMN_DAMPING * exact.diagonal(dim1=1, dim2=2).mean() * torch.eye(
        exact.shape[1], dtype=torch.float64
    )


def _damped_rows(rows: RowWeights | None) -> Float64[Tensor, "..."] | None:
    """R with a ridge, or its diagonal; None where nothing is known."""
    if rows is None or not bool((rows.importance > 0).any()):
        return None
    if rows.moment is None:
        share = rows.importance.double()
        return share.clamp(min=SMALLEST_SHARE * float(share.mean()))
    exact = rows.moment.double()
    ridge = ROW_DAMPING * exact.diagonal().mean()
    return (exact + ridge * torch.eye(len(exact), dtype=torch.float64))[None]


def _root(side: Tensor | None, length: int) -> Tensor:
    """A root L where L Lᵀ is the moment; of a diagonal, its diagonal."""
    if side is None:
        return torch.ones(length, dtype=torch.float64)
    if side.dim() == 1:
        return side.sqrt()
    root: Tensor = torch.linalg.cholesky(side[0])
    return root


def _divided(part: Tensor, root: Tensor) -> Tensor:
    """Multiply rows by the inverse of a root."""
    if root.dim() == 1:
        return part / root
    quotient: Tensor = torch.linalg.solve_triangular(root, part, upper=False, left=False)
    return quotient


def _made_whole(part: Float64[Tensor, "rank side"]) -> Float32[Tensor, "rank side"]:
    return part.float().contiguous()


def _as_unit(rank: int, side: int) -> Unit:
    return Unit("factor", "linear", (rank, side), ("linear",))


def _under(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one factor."""
    return {
        of.removeprefix(f"{name}_"): tensor
        for of, tensor in tensors.items()
        if of.startswith(f"{name}_")
    }
