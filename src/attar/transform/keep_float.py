"""Keep a unit in a float format: the treatment of what must not be touched."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attar.errors import SettingError
from attar.records import Cost, Replacement, RowWeights, Unit
from attar.settings import check_choice, check_flag
from attar.transform.groups import row_chunks, take_stored

# Largest rounding error, as a fraction of the largest weight. float16 errs by 2**-11 of each weight
# and bfloat16 by 2**-9, so only weights too small for float16 come near it.
LARGEST_ERROR = 2.0**-8


@dataclass(frozen=True)
class KeepFloat:
    """Store each weight as a float.

    Attributes:
        bits: 16 or 32.
        bfloat16: With 16 bits: bfloat16 (range of float32, 8 bits of precision), not float16.
    """

    bits: int = 16
    bfloat16: bool = False

    def __post_init__(self) -> None:
        check_choice("keep_float", "bits", self.bits, (16, 32), suggestion=16)
        check_flag("keep_float", "bfloat16", self.bfloat16)
        if self.bits == 32 and self.bfloat16:
            raise SettingError(
                "bfloat16 is true and bits is 32, but a bfloat16 has 16 bits.",
                hint="set bits to 16, or bfloat16 to false.",
            )

    @property
    def dtype(self) -> torch.dtype:
        """The format the weight is stored in."""
        if self.bits == 32:
            return torch.float32
        return torch.bfloat16 if self.bfloat16 else torch.float16

    def label(self) -> str:
        """Name the treatment in few words."""
        return str(self.dtype).removeprefix("torch.")

    def rejects(self, unit: Unit) -> str | None:  # noqa: ARG002
        return None

    def cost(self, unit: Unit) -> Cost:
        return Cost(weight_bytes=unit.n_weights * self.bits // 8, macs=unit.macs)

    def apply(
        self,
        weight: Float[Tensor, "rows columns"],
        moment: Float[Tensor, "..."] | None,  # noqa: ARG002
        rows: RowWeights | None = None,  # noqa: ARG002
    ) -> Replacement:
        stored = to_float(weight, self.dtype)
        return Replacement(tensors={"weight": stored}, dense=stored.to(torch.float32, copy=True))

    def decode(
        self, tensors: Mapping[str, Tensor], rows: int, columns: int
    ) -> Float[Tensor, "rows columns"]:
        stored = take_stored(tensors, "weight", self.dtype, (rows, columns))
        return stored.to(torch.float32, copy=True)


def to_float(
    weight: Float[Tensor, "rows columns"], dtype: torch.dtype
) -> Float[Tensor, "rows columns"]:
    """Copy a weight into a float format.

    Raises:
        SettingError: The format cannot hold the weight: it would overflow, or vanish.
    """
    stored = weight.to(dtype, copy=True)
    chunks = [(stored[chunk].float(), weight[chunk]) for chunk in row_chunks(*weight.shape)]
    error = max(float((after - before).abs().max()) for after, before in chunks)
    largest = max(float(weight.max()), -float(weight.min()))
    if not error <= LARGEST_ERROR * largest:  # so that an infinite error or NaN does not pass
        name = str(dtype).removeprefix("torch.")
        raise SettingError(
            f"the weights reach {largest:.3g}, which is outside the range of {name}.",
            hint="keep this unit in 32 bits, or in 16 bits with bfloat16 set to true.",
        )
    return stored
