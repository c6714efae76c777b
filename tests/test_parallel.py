"""Work done side by side: in order, one thread each, and the same for any number of threads."""

import threading

import pytest
import torch

from attar.parallel import in_order, one_thread


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items(threads):
    first_waits = threading.Event()

    def work(item):
        if item == 0 and threads > 1:
            assert first_waits.wait(30)  # until a later one is done
        if item == 1:
            first_waits.set()
        return item * item

    assert list(in_order(work, range(7))) == [item * item for item in range(7)]


def test_each_piece_of_work_has_one_thread_and_the_caller_gets_its_own_back(threads):
    assert list(in_order(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
    assert torch.get_num_threads() == threads


def test_an_error_comes_through_and_the_threads_are_given_back(threads):
    def work(item):
        if item == 2:
            raise ValueError("two")
        return item

    with pytest.raises(ValueError, match="two"):
        list(in_order(work, range(5)))
    assert torch.get_num_threads() == threads


def test_sums_do_not_depend_on_the_number_of_threads(threads):
    x = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))
    with one_thread():
        expected = x.T @ x
    assert all(torch.equal(found, expected) for found in in_order(lambda _: x.T @ x, range(3)))
