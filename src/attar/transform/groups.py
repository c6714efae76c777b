"""Group-wise integer codes: scales, zero points, codes, and how they are stored.

    weight = scale · (code − zero_point)

A group is `group_size` consecutive columns of one row; group_size 0 means the whole row. Shared by
every transform that stores integer codes. All functions are pure and work through few rows at a
time, so that they need little memory beside their result; every sum has a fixed order, so that
the result does not depend on the number of threads.

Source: Jacob et al. 2018, https://arxiv.org/abs/1712.05877, eq. 1, with r = S (q − Z).
We differ in three ways. The scale is stored in float16, rounded up, so that the group's range is
covered and no weight moves by more than half a step. A group of zeros gets scale 1. The range can
be searched (`find_scales`) instead of taken from minimum and maximum.
"""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Float16, Float32, UInt8
from torch import Tensor

from attar.errors import ModelError, SettingError
from attar.kernels import bitpack

SCALE_BYTES = 2  # float16
LARGEST_SCALE = 65504.0  # the largest float16
SMALLEST_SCALE = 2.0**-24  # the smallest float16 above 0
# Parts of the group's full range that the search tries, the full range first.
RANGE_FACTORS = tuple(round(1 - 0.05 * k, 2) for k in range(11))
# Codes of more bits than this have small steps: cutting off a quarter of the range never pays.
COARSE_BITS = 4
FINE_FACTORS = 5
# Weights handled at once: 2 MiB for each float32 buffer, which stays in cache and outweighs what it
# costs to start an operation.
CHUNK_WEIGHTS = 1 << 19

# How many groups there are differs from setting to setting, so the axis has no name.
Scales = tuple[Float16[Tensor, "rows _"], UInt8[Tensor, "rows _"]]


def group_width(columns: int, group_size: int) -> int:
    """Columns in one group: group_size, or all of them where it is 0."""
    return group_size or columns


def refuse_groups(columns: int, group_size: int) -> str | None:
    """Say why a row of `columns` cannot be cut into groups; None where it can."""
    if columns % group_width(columns, group_size):
        return f"has {columns} columns, which is not a multiple of group_size {group_size}"
    return None


def label(bits: int, group_size: int, symmetric: bool) -> str:
    """Name integer codes in few words."""
    per = f"groups of {group_size}" if group_size else "one scale per row"
    return f"{bits} bit, {per}" + (", symmetric" if symmetric else "")


def row_chunks(rows: int, columns: int, weights: int = CHUNK_WEIGHTS) -> Iterator[slice]:
    """Cut a matrix into few rows at a time, about so many weights or one row."""
    step = max(1, weights // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def column_weights(
    moment: Float[Tensor, " columns"] | Float[Tensor, "row_groups columns columns"] | None,
) -> Float32[Tensor, "row_groups columns"] | None:
    """Take the diagonal of a second moment: how much an error in each column counts.

    Returns:
        Scaled to a largest value of 1, so that float32 sums of it cannot overflow or vanish; rows
        split evenly over row_groups. None where the moment is None or all zeros.
    """
    if moment is None:
        return None
    diagonal = moment[None] if moment.ndim == 1 else moment.diagonal(dim1=-2, dim2=-1)
    diagonal = diagonal.to(torch.float64).clamp(min=0)
    largest = diagonal.max()
    return (diagonal / largest).float() if largest > 0 else None


def spread_rows(
    column_weight: Float[Tensor, "*row_groups columns"] | None, rows: int, chunk: slice
) -> Float[Tensor, "chunk columns"] | None:
    """Give some of `rows` rows the column weights of their row group."""
    if column_weight is None:
        return None
    per_group = column_weight.reshape(-1, column_weight.shape[-1])
    row = torch.arange(rows, device=column_weight.device)[chunk]
    return per_group[row * len(per_group) // rows]


def find_scales(
    weight: Float[Tensor, "rows columns"],
    bits: int,
    group_size: int,
    symmetric: bool,
    column_weight: Float[Tensor, "*row_groups columns"] | None = None,
    search: bool = True,
) -> Scales:
    """Choose the range of every group.

    Args:
        weight: Any float dtype, finite.
        bits: Width of a code, 2 to 8.
        group_size: Must divide columns; 0 = whole row.
        symmetric: Fix the zero point at the middle code, 2**(bits - 1).
        column_weight: How much a squared error in each column counts, >= 0; rows split evenly over
            row_groups. None: all the same.
        search: Try smaller ranges too (RANGE_FACTORS) and take, per group, the one with the least
            weighted squared error. Weights outside a smaller range are cut off.

    Returns:
        scale: Weight units per code step, > 0.
        zero_point: The code that stands for 0.0.

    Raises:
        SettingError: The weights are too large or too small for a float16 scale.
    """
    rows, columns = weight.shape
    width = group_width(columns, group_size)
    groups = weight.reshape(rows, columns // width, width)
    # The range always contains 0.0, so that zero_point is a code and zeros decode exactly.
    low, high = groups.amin(-1).float().clamp(max=0), groups.amax(-1).float().clamp(min=0)
    _check_range(_exact_scale(low, high, bits, symmetric))
    if not search:
        return _scales_of(low, high, bits, symmetric)
    scale = low.new_empty(low.shape, dtype=torch.float16)
    zero_point = low.new_empty(low.shape, dtype=torch.uint8)
    for chunk in row_chunks(rows, columns):
        importance = spread_rows(column_weight, rows, chunk)
        found = _search(
            _by_group(weight[chunk], width),
            None if importance is None else _by_group(importance, width),
            low[chunk].flatten(),
            high[chunk].flatten(),
            bits,
            symmetric,
        )
        scale[chunk] = found[0].view_as(scale[chunk])
        zero_point[chunk] = found[1].view_as(zero_point[chunk])
    return scale, zero_point


def encode(
    weight: Float[Tensor, "rows columns"],
    scale: Float16[Tensor, "rows n_groups"],
    zero_point: UInt8[Tensor, "rows n_groups"],
    bits: int,
    group_size: int,
) -> UInt8[Tensor, "rows columns"]:
    """Round every weight to the nearest code; weights outside the range get its end."""
    rows, columns = weight.shape
    width = group_width(columns, group_size)
    codes = weight.new_empty(rows, columns, dtype=torch.uint8)
    for chunk in row_chunks(rows, columns):
        steps = weight[chunk].float().reshape(-1, columns // width, width)
        steps = steps / scale[chunk].float()[..., None]
        steps.round_().add_(zero_point[chunk][..., None]).clamp_(0, (1 << bits) - 1)
        codes[chunk] = steps.view(-1, columns)
    return codes


def decode_codes(
    codes: UInt8[Tensor, "rows columns"],
    scale: Float16[Tensor, "rows n_groups"],
    zero_point: UInt8[Tensor, "rows n_groups"],
    group_size: int,
) -> Float32[Tensor, "rows columns"]:
    """Turn codes into weights."""
    rows, columns = codes.shape
    width = group_width(columns, group_size)
    dense = codes.new_empty(rows, columns, dtype=torch.float32)
    for chunk in row_chunks(rows, columns):
        steps = codes[chunk].view(-1, columns // width, width).float()
        steps.sub_(zero_point[chunk][..., None]).mul_(scale[chunk].float()[..., None])
        dense[chunk] = steps.view(-1, columns)
    return dense


def store(
    codes: UInt8[Tensor, "rows columns"],
    scale: Float16[Tensor, "rows n_groups"],
    zero_point: UInt8[Tensor, "rows n_groups"],
    bits: int,
    symmetric: bool,
) -> dict[str, Tensor]:
    """Pack codes and zero points into the tensors that a file holds."""
    tensors = {"codes": bitpack.pack(codes.flatten(), bits), "scale": scale}
    if not symmetric:
        tensors["zero_point"] = bitpack.pack(zero_point.flatten(), bits)
    return tensors


def load_stored(
    tensors: Mapping[str, Tensor],
    bits: int,
    rows: int,
    columns: int,
    group_size: int,
    symmetric: bool,
) -> tuple[
    UInt8[Tensor, "rows columns"],
    Float16[Tensor, "rows n_groups"],
    UInt8[Tensor, "rows n_groups"],
]:
    """Undo `store`: codes, scale, zero_point.

    Raises:
        ModelError: A tensor is missing, or is not of the dtype or size it must have.
    """
    shape = (rows, columns // group_width(columns, group_size))
    codes = unpack_stored(tensors, "codes", bits, (rows, columns))
    scale = load_scale(tensors, rows, columns, group_size)
    if symmetric:
        return codes, scale, middle_code(scale, bits)
    return codes, scale, unpack_stored(tensors, "zero_point", bits, shape)


def middle_code(scale: Float16[Tensor, "*shape"], bits: int) -> UInt8[Tensor, "*shape"]:
    """Make the zero points of symmetric codes, which are not stored."""
    return torch.full_like(scale, 1 << bits - 1, dtype=torch.uint8)


def stored_bytes(rows: int, columns: int, bits: int, group_size: int, symmetric: bool) -> int:
    """Count the bytes of the tensors `store` returns, from shapes alone."""
    n_scales = rows * (columns // group_width(columns, group_size))
    zero_points = 0 if symmetric else bitpack.packed_bytes(n_scales, bits)
    return bitpack.packed_bytes(rows * columns, bits) + SCALE_BYTES * n_scales + zero_points


def load_scale(
    tensors: Mapping[str, Tensor], rows: int, columns: int, group_size: int
) -> Float16[Tensor, "rows n_groups"]:
    """Take the scales read from a file.

    Raises:
        ModelError: They are missing, or not as many as they must be, or not numbers above 0.
    """
    shape = (rows, columns // group_width(columns, group_size))
    scale = take_stored(tensors, "scale", torch.float16, shape)
    if not bool((scale > 0).all() and scale.isfinite().all()):
        raise damaged("a stored scale is not a number above 0.")
    return scale


def take_stored(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...] | None
) -> Tensor:
    """Take a tensor read from a file, checked; shape None means any length of one dimension.

    Raises:
        ModelError: It is missing, or is not of this dtype and shape.
    """
    if name not in tensors:
        raise damaged(f"tensor {name} is missing.")
    tensor = tensors[name]
    fits = tensor.ndim == 1 if shape is None else tuple(tensor.shape) == shape
    if tensor.dtype != dtype or not fits:
        raise damaged(
            f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)} where {dtype} "
            f"{'of one dimension' if shape is None else shape} belongs."
        )
    return tensor


def unpack_stored(
    tensors: Mapping[str, Tensor], name: str, bits: int, shape: tuple[int, int]
) -> UInt8[Tensor, "rows columns"]:
    """Take packed codes read from a file and unpack them.

    Raises:
        ModelError: They are missing, or are not as many bytes as they must be.
    """
    packed = take_stored(tensors, name, torch.uint8, None)
    return bitpack.unpack(packed, bits, shape[0] * shape[1]).view(shape)


def damaged(problem: str) -> ModelError:
    """Make the error for stored tensors that no transform can have written."""
    return ModelError(
        f"a compressed weight cannot be decoded: {problem}",
        hint="the model file is damaged or edited; compress or download it again.",
    )


def _exact_scale(
    low: Float32[Tensor, "*shape"], high: Float32[Tensor, "*shape"], bits: int, symmetric: bool
) -> Float32[Tensor, "*shape"]:
    """Weight units per code step that just cover the range; 0 for a group of zeros."""
    if not symmetric:
        return (high - low) / ((1 << bits) - 1)
    middle = 1 << bits - 1  # codes below the zero point; there is one less above it
    return torch.maximum(high / (middle - 1), low / -middle)


def _check_range(exact: Float32[Tensor, "*shape"]) -> None:
    largest = float(exact.max())
    if not largest <= LARGEST_SCALE:  # so that NaN does not pass
        raise SettingError(
            f"a group of weights needs a scale of {largest:.3g}; float16 ends at 65504.",
            hint="keep this unit in 32 bits, or give it more bits or smaller groups.",
        )
    # One tiny group among others may decode to zeros; a whole weight may not.
    if 0 < largest < SMALLEST_SCALE:
        raise SettingError(
            f"the weights are so small that their largest scale is {largest:.3g}; "
            f"float16 begins at {SMALLEST_SCALE:.3g}.",
            hint="keep this unit in 32 bits.",
        )


def _scales_of(
    low: Float32[Tensor, "*shape"], high: Float32[Tensor, "*shape"], bits: int, symmetric: bool
) -> tuple[Float16[Tensor, "*shape"], UInt8[Tensor, "*shape"]]:
    exact = _exact_scale(low, high, bits, symmetric)
    nearest = exact.half()
    # The next float16 above has the next larger bit pattern; above 0 comes SMALLEST_SCALE.
    rounded_up = (nearest.view(torch.int16) + (nearest.float() < exact)).view(torch.float16)
    scale = torch.where(exact > 0, rounded_up, 1.0)
    if symmetric:
        return scale, middle_code(scale, bits)
    zero_point = (-low / scale.float()).round_().clamp_(0, (1 << bits) - 1)
    return scale, zero_point.to(torch.uint8)


def _by_group(weight: Float[Tensor, "rows columns"], width: int) -> Float32[Tensor, "width groups"]:
    """Lay groups side by side in memory, so that every operation runs along them."""
    return weight.float().reshape(-1, width).T.contiguous()


def _search(
    weight: Float32[Tensor, "width groups"],
    importance: Float32[Tensor, "width groups"] | None,
    low: Float32[Tensor, " groups"],
    high: Float32[Tensor, " groups"],
    bits: int,
    symmetric: bool,
) -> tuple[Float16[Tensor, " groups"], UInt8[Tensor, " groups"]]:
    """Try every range factor; of equal errors the larger range wins."""
    best_scale, best_zero_point = _scales_of(low, high, bits, symmetric)
    least = _squared_error(weight, importance, best_scale, best_zero_point, bits)
    for factor in RANGE_FACTORS[1 : None if bits <= COARSE_BITS else FINE_FACTORS]:
        scale, zero_point = _scales_of(low * factor, high * factor, bits, symmetric)
        error = _squared_error(weight, importance, scale, zero_point, bits)
        better = error < least
        least = torch.where(better, error, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
    return best_scale, best_zero_point


def _squared_error(
    weight: Float32[Tensor, "width groups"],
    importance: Float32[Tensor, "width groups"] | None,
    scale: Float16[Tensor, " groups"],
    zero_point: UInt8[Tensor, " groups"],
    bits: int,
) -> Float32[Tensor, " groups"]:
    step, lowest = scale.float(), -zero_point.float()
    exact = weight / step
    error = exact.round().clamp_(lowest, lowest + ((1 << bits) - 1)).sub_(exact).square_()
    if importance is not None:
        error.mul_(importance)
    return _sum_in_order(error) * step.square()


def _sum_in_order(terms: Float32[Tensor, "width groups"]) -> Float32[Tensor, " groups"]:
    """Add up the rows by halves, in place: the order never depends on the number of threads."""
    width = len(terms)
    while width > 1:
        half = width // 2
        terms[:half] += terms[width - half : width]
        width -= half
    return terms[0]
