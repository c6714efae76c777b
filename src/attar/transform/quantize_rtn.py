"""Round-to-nearest quantization: every weight becomes a `bits`-wide code of its group.

The baseline that every other quantizer must beat. Of the second moment it uses only the diagonal,
and only to choose ranges.

Source: see groups.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from attar.records import Cost, Replacement, RowWeights, Unit
from attar.settings import WIDTHS, check_choice, check_flag, check_group_size
from attar.transform import groups


@dataclass(frozen=True)
class QuantizeRtn:
    """Store each weight as the nearest code of its group.

    Attributes:
        bits: Width of a stored code, 2 to 8.
        group_size: Columns that share one scale; 0 = the whole row.
        symmetric: Fix the zero point at the middle code instead of storing it.
        search: Try smaller ranges and take the one with the least weighted squared error.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    search: bool = True

    def __post_init__(self) -> None:
        check_choice("quantize_rtn", "bits", self.bits, WIDTHS, suggestion=4)
        check_group_size("quantize_rtn", self.group_size)
        check_flag("quantize_rtn", "symmetric", self.symmetric)
        check_flag("quantize_rtn", "search", self.search)

    def label(self) -> str:
        """Name the treatment in few words."""
        return groups.label(self.bits, self.group_size, self.symmetric)

    def rejects(self, unit: Unit) -> str | None:
        return groups.refuse_groups(unit.columns, self.group_size)

    def cost(self, unit: Unit) -> Cost:
        weight_bytes = groups.stored_bytes(
            unit.rows, unit.columns, self.bits, self.group_size, self.symmetric
        )
        return Cost(weight_bytes=weight_bytes, macs=unit.macs)

    def apply(
        self,
        weight: Float[Tensor, "rows columns"],
        moment: Float[Tensor, "..."] | None,
        rows: RowWeights | None = None,  # noqa: ARG002
    ) -> Replacement:
        scale, zero_point = groups.find_scales(
            weight,
            self.bits,
            self.group_size,
            self.symmetric,
            groups.column_weights(moment),
            self.search,
        )
        codes = groups.encode(weight, scale, zero_point, self.bits, self.group_size)
        return Replacement(
            tensors=groups.store(codes, scale, zero_point, self.bits, self.symmetric),
            dense=groups.decode_codes(codes, scale, zero_point, self.group_size),
        )

    def decode(
        self, tensors: Mapping[str, Tensor], rows: int, columns: int
    ) -> Float[Tensor, "rows columns"]:
        codes, scale, zero_point = groups.load_stored(
            tensors, self.bits, rows, columns, self.group_size, self.symmetric
        )
        return groups.decode_codes(codes, scale, zero_point, self.group_size)
