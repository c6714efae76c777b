import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import ModelError
from attar.kernels import bitpack
from attar.kernels.bitpack import CHUNK_WORDS, pack, packed_bytes, unpack

WIDTHS = pytest.mark.parametrize("bits", range(1, 9))


def random_codes(n, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (n,), dtype=torch.uint8, generator=generator)


def test_first_code_fills_the_lowest_bits():
    # 3-bit codes 1, 2, 7: stream 001, 010, 111 from the lowest bit up = 0b1_1101_0001.
    packed = pack(torch.tensor([1, 2, 7], dtype=torch.uint8), 3)
    assert packed.tolist() == [0b11010001, 0b1]


@WIDTHS
@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 33, 123])
def test_pack_and_unpack_equal_their_references(bits, n):
    codes = random_codes(n, bits, seed=n)
    packed = pack(codes, bits)
    assert torch.equal(packed, bitpack.reference_pack(codes, bits))
    assert torch.equal(unpack(packed, bits, n), bitpack.reference_unpack(packed, bits, n))
    assert torch.equal(unpack(packed, bits, n), codes)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.data(), st.integers(1, 8))
def test_any_codes_come_back_in_exactly_their_bytes(data, bits):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    codes = torch.tensor(values, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.nbytes == -(-len(values) * bits // 8) == packed_bytes(len(values), bits)
    assert unpack(packed, bits, len(values)).tolist() == values


@WIDTHS
def test_largest_codes_fill_every_bit(bits):
    packed = pack(torch.full((64,), 2**bits - 1, dtype=torch.uint8), bits)
    assert set(packed.tolist()) == {255}


@pytest.mark.parametrize("bits", [3, 7])
@pytest.mark.parametrize("extra", [-1, 0, 1, 13])
def test_codes_come_back_across_the_chunk_border(bits, extra):
    codes = random_codes(CHUNK_WORDS * 8 + extra, bits)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, len(codes)), codes)
    last = CHUNK_WORDS - 2  # words before the border; the unused bits at the end must be 0
    assert torch.equal(packed[last * bits :], bitpack.reference_pack(codes[last * 8 :], bits))


@WIDTHS
def test_inputs_are_untouched_and_not_shared(bits):
    codes = random_codes(33, bits)
    before = codes.clone()
    packed = pack(codes, bits)
    packed_before = packed.clone()
    unpacked = unpack(packed, bits, 33)
    unpacked.zero_()
    assert torch.equal(packed, packed_before)
    packed.zero_()
    assert torch.equal(codes, before)


def test_codes_that_start_inside_a_buffer_are_packed():
    codes = random_codes(100, 3)[3:]
    assert torch.equal(pack(codes, 3), pack(codes.clone(), 3))


@WIDTHS
def test_fresh_memory_is_never_read(bits):
    codes = random_codes(1001, bits)
    expected = bitpack.reference_pack(codes, bits)
    for _ in range(3):
        poison = torch.full((1 << 12,), 255, dtype=torch.uint8)
        del poison
        assert torch.equal(pack(codes, bits), expected)


def test_code_wider_than_bits_is_our_mistake():
    with pytest.raises(AssertionError):
        pack(torch.tensor([8], dtype=torch.uint8), 3)


@pytest.mark.parametrize("n_bytes", [0, 3, 5])
def test_wrong_number_of_bytes_is_refused_with_both_numbers(n_bytes):
    with pytest.raises(ModelError, match=f"{n_bytes} bytes .* 10 codes of 3 bits fill 4") as caught:
        unpack(torch.zeros(n_bytes, dtype=torch.uint8), 3, 10)
    assert "damaged" in caught.value.hint
