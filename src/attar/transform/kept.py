"""The values that are left when a zeroing transform has chosen: gathered, stored, put back.

The same number is kept in every row, so they form a matrix `rows n_kept`. It is stored as float16,
or as symmetric codes with one scale per group of kept values; the last group of a row may be short.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Float16, Float32
from torch import Tensor
from torch.nn import functional as F

from attar.kernels import bitpack
from attar.transform import groups
from attar.transform.keep_float import to_float


def wanda_score(
    weight: Float[Tensor, "rows columns"], importance: Float[Tensor, "rows columns"] | None
) -> Float32[Tensor, "rows columns"]:
    """Score each weight by what it adds to its output: |w| · sqrt(E[x²]). Higher = keep.

    Source: Sun et al. 2023, https://arxiv.org/abs/2306.11695, eq. 1, with E[x²] for ‖x‖², which
    differs by the same factor for all. Without a second moment: |w|.
    """
    size = weight.abs().float()
    return size if importance is None else size * importance.sqrt()


def gather_kept(
    weight: Float[Tensor, "rows columns"],
    kept: Bool[Tensor, "rows columns"],
    column_weight: Float[Tensor, "*row_groups columns"] | None,
) -> tuple[Float32[Tensor, "rows n_kept"], Float32[Tensor, "rows n_kept"] | None]:
    """Take the kept weights, in order of columns, and how much an error in each counts."""
    rows, columns = weight.shape
    values = weight.new_empty(rows, int(kept[0].sum()), dtype=torch.float32)
    importance = None if column_weight is None else torch.empty_like(values)
    for chunk in groups.row_chunks(rows, columns):
        places = kept[chunk].flatten().nonzero()[:, 0]
        values[chunk] = weight[chunk].flatten()[places].view_as(values[chunk])
        spread = groups.spread_rows(column_weight, rows, chunk)
        if importance is not None and spread is not None:
            importance[chunk] = spread.flatten()[places].view_as(importance[chunk])
    return values, importance


def store_kept(
    values: Float32[Tensor, "rows n_kept"],
    importance: Float32[Tensor, "rows n_kept"] | None,
    bits: int,
    group_size: int,
) -> dict[str, Tensor]:
    """Turn kept values into the tensors that a file holds.

    Raises:
        SettingError: The values are too large or too small for float16 (scales).
    """
    if bits == 16:
        return {"values": to_float(values, torch.float16)}
    n_kept = values.shape[1]
    scale = scales_of(values, importance, bits, group_size)
    padded = F.pad(values, (0, -n_kept % groups.group_width(n_kept, group_size)))
    zero_point = groups.middle_code(scale, bits)
    codes = groups.encode(padded, scale, zero_point, bits, group_size)[:, :n_kept]
    return groups.store(codes.contiguous(), scale, zero_point, bits, symmetric=True)


def scales_of(
    values: Float32[Tensor, "rows n_kept"],
    importance: Float32[Tensor, "rows n_kept"] | None,
    bits: int,
    group_size: int,
) -> Float16[Tensor, "rows groups"]:
    """Choose the scale of every group of kept values."""
    short = (0, -values.shape[1] % groups.group_width(values.shape[1], group_size))
    spread = None if importance is None else F.pad(importance, short)
    return groups.find_scales(F.pad(values, short), bits, group_size, True, spread)[0]


def load_kept(
    tensors: Mapping[str, Tensor], bits: int, rows: int, n_kept: int, group_size: int
) -> Float32[Tensor, "rows n_kept"]:
    """Decode what `store_kept` stored.

    Raises:
        ModelError: A tensor is missing, or is not of the dtype or size it must have.
    """
    if bits == 16:
        return groups.take_stored(tensors, "values", torch.float16, (rows, n_kept)).float()
    short = -n_kept % groups.group_width(n_kept, group_size)
    codes = F.pad(groups.unpack_stored(tensors, "codes", bits, (rows, n_kept)), (0, short))
    scale = groups.load_scale(tensors, rows, n_kept + short, group_size)
    zero_point = groups.middle_code(scale, bits)
    return groups.decode_codes(codes, scale, zero_point, group_size)[:, :n_kept].contiguous()


def kept_bytes(rows: int, n_kept: int, bits: int, group_size: int) -> int:
    """Count the bytes of the tensors `store_kept` returns, from shapes alone."""
    if bits == 16:
        return 2 * rows * n_kept  # float16: 2 bytes
    n_groups = -(-n_kept // groups.group_width(n_kept, group_size))
    return bitpack.packed_bytes(rows * n_kept, bits) + groups.SCALE_BYTES * rows * n_groups


def put_back(
    kept: Bool[Tensor, "rows columns"], values: Float32[Tensor, "rows n_kept"]
) -> Float32[Tensor, "rows columns"]:
    """Build the dense weight: kept values at their places, exactly 0 elsewhere."""
    return torch.zeros(kept.shape, device=values.device).masked_scatter_(kept, values)


def kept_label(part: str, bits: int) -> str:
    """Name a zeroing treatment in few words."""
    return f"{part} kept in float16" if bits == 16 else f"{part} kept at {bits} bit"
