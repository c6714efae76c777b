import pytest
import torch

from attar.transform import groups
from attar.transform.kept import gather_kept, kept_bytes, load_kept, put_back, store_kept


def random_weight(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def two_of_each_row(rows, columns):
    kept = torch.zeros(rows, columns, dtype=torch.bool)
    for row in range(rows):
        kept[row, row % columns] = kept[row, (row + 3) % columns] = True
    return kept


@pytest.mark.parametrize("row_groups", [None, 1, 3])
@pytest.mark.parametrize("chunk_weights", [1, 1 << 19])
def test_values_and_importance_are_gathered_in_order_of_columns(
    row_groups, chunk_weights, monkeypatch
):
    monkeypatch.setattr(groups, "CHUNK_WEIGHTS", chunk_weights)
    weight, kept = random_weight(6, 7), two_of_each_row(6, 7)
    column_weight = None if row_groups is None else random_weight(row_groups, 7, seed=1).square()
    values, importance = gather_kept(weight, kept, column_weight)
    for row in range(6):
        places = [column for column in range(7) if kept[row, column]]
        assert values[row].tolist() == [float(weight[row, column]) for column in places]
        if row_groups is not None:
            counted = column_weight[row * row_groups // 6]
            assert importance[row].tolist() == [float(counted[column]) for column in places]
    assert (importance is None) is (row_groups is None)


@pytest.mark.parametrize("bits", [2, 5, 8, 16])
@pytest.mark.parametrize("group_size", [0, 1, 4, 64])
@pytest.mark.parametrize(("rows", "n_kept"), [(1, 1), (7, 9), (3, 33)])
def test_stored_values_come_back_near_and_weigh_what_was_said(bits, group_size, rows, n_kept):
    values = random_weight(rows, n_kept)
    tensors = store_kept(values, None, bits, group_size)
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert stored == kept_bytes(rows, n_kept, bits, group_size)
    back = load_kept(tensors, bits, rows, n_kept, group_size)
    # Each bit halves a step; 2 bits have the steps -2, -1, 0 and 1. float16 errs by 2**-11.
    allowed = {2: 0.7, 5: 0.08, 8: 0.01, 16: 2.0**-11}[bits]
    assert (back - values).norm() <= allowed * values.norm()


def test_values_are_put_back_where_they_were():
    weight, kept = random_weight(6, 7), two_of_each_row(6, 7)
    values, _ = gather_kept(weight, kept, None)
    assert torch.equal(put_back(kept, values), torch.where(kept, weight, 0.0))
