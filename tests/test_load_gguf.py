import random
import struct

import gguf
import pytest
import torch
from tiny_models import LLAMA, random_model, state_of, write_gguf
from tokenizers import Tokenizer

from attar.errors import ModelError
from attar.load.gguf_file import decode_tensor, read_gguf
from attar.load.gguf_model import FAMILIES, read_gguf_model
from attar.load.gguf_tokenizer import PRE_TOKENIZERS, merges_of_vocabulary, tokenizer_json
from attar.load.model import load_model


@pytest.fixture(scope="module")
def module():
    return random_model(LLAMA)


@pytest.fixture(scope="module")
def plain(module, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "plain.gguf", module, LLAMA)


def test_float_tensors_come_back_bit_for_bit_in_transformers_order(module, plain):
    parts, expected = read_gguf_model(plain), state_of(module)
    assert set(parts.state) == set(expected)
    assert all(torch.equal(parts.state[name], tensor) for name, tensor in expected.items())
    assert parts.source_bytes == sum(4 * tensor.numel() for tensor in expected.values())
    assert parts.licence == "apache-2.0"


def test_the_loaded_model_gives_the_same_logits(module, plain):
    model = load_model(str(plain))
    tokens = model.examples["tokens"]
    with torch.no_grad():
        assert torch.equal(model.task.forward(model.module, model.examples), module(tokens).logits)
    assert tokens.shape == (2, 16)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16"])
def test_quantized_tensors_decode_as_gguf_itself_decodes_them(module, tmp_path, kind):
    quantization = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "q.gguf", module, LLAMA, quantization=quantization)
    file = read_gguf(path)
    for tensor in gguf.GGUFReader(path).tensors:
        truth = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert torch.equal(decode_tensor(file, tensor.name), torch.from_numpy(truth.copy()))


def test_the_tokenizer_merges_splits_digits_and_keeps_control_tokens(plain):
    parts = read_gguf_model(plain)
    tokenizer = Tokenizer.from_buffer(parts.files["tokenizer.json"])
    assert tokenizer.encode("see the 12</s>").tokens == [
        *("s", "e", "e", "Ġthe", "Ġ", "1", "2", "</s>")
    ]
    assert tokenizer.decode(tokenizer.encode("the 12").ids) == "the 12"
    assert parts.files["chat_template.jinja"] == b"{{ messages }}"


def test_the_gpt2_rule_keeps_numbers_whole(module, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", module, LLAMA, rule="gpt-2")
    tokenizer = Tokenizer.from_buffer(read_gguf_model(path).files["tokenizer.json"])
    assert tokenizer.encode("12").tokens == ["12"]


@pytest.mark.parametrize("rule", PRE_TOKENIZERS)
def test_every_splitting_rule_is_one_that_tokenizers_accepts(rule):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
    }
    tokenizer = Tokenizer.from_buffer(tokenizer_json(metadata, "llama"))
    assert tokenizer.encode("ab").tokens == ["ab"]


def sentencepiece_metadata(**more):
    tokens = ["<pad>", "<bos>", "<unk>", "▁", "a", "b", "ab", "▁ab", "  ", "<0xC3>", "<0xA9>"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 2, 1, 1, 1, 1, 1, 4, 6, 6],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -5.0, -4.0, -3.0, -1.0, -2.0, -6.0, 0.0, 0.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
        **more,
    }


def test_a_sentencepiece_vocabulary_merges_falls_back_to_bytes_and_starts_with_bos():
    tokenizer = Tokenizer.from_buffer(tokenizer_json(sentencepiece_metadata(), "gemma3"))
    encoded = tokenizer.encode("ab ab  é")
    assert encoded.tokens == ["<bos>", "ab", "▁ab", "▁▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoded.ids) == "ab ab  é"


def test_a_llama_vocabulary_puts_a_space_in_front():
    metadata = sentencepiece_metadata(**{"tokenizer.ggml.add_space_prefix": True})
    tokenizer = Tokenizer.from_buffer(tokenizer_json(metadata, "llama"))
    assert tokenizer.encode("ab").tokens == ["<bos>", "▁ab"]
    assert tokenizer.decode(tokenizer.encode("ab").ids) == "ab"


def test_recovered_merges_are_those_of_transformers():
    from transformers.tokenization_utils_base import generate_merges

    letters = random.Random(0)
    words = {"".join(letters.choices("abc", k=letters.randint(1, 5))) for _ in range(120)}
    tokens = sorted(words)
    scores = [-float(position % 17) for position in range(len(tokens))]
    vocabulary = {token: position for position, token in enumerate(tokens)}
    truth = generate_merges(vocabulary, dict(zip(tokens, scores, strict=True)))
    ours = merges_of_vocabulary(tokens, scores)
    assert sorted(ours) == sorted(f"{left} {right}" for left, right in truth)
    assert [best_score(m, tokens, scores) for m in ours] == [
        best_score(f"{left} {right}", tokens, scores) for left, right in truth
    ]


def best_score(merge, tokens, scores):
    return scores[tokens.index(merge.replace(" ", ""))]


def test_an_unknown_architecture_is_named_with_the_known_ones(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "bloom")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"bloom.*llama, gemma3") as caught:
        load_model(str(tmp_path / "m.gguf"))
    assert "Hugging Face folder" in caught.value.hint
    assert set(FAMILIES) == {"llama", "gemma3"}


def test_a_file_cut_anywhere_is_refused(plain, tmp_path):
    whole = plain.read_bytes()
    cut = tmp_path / "cut.gguf"
    places = [0, 3, 4, 8, 20, 24, 60, 500, 2000, len(whole) // 2, len(whole) - 40]
    for place in places:
        cut.write_bytes(whole[:place])
        with pytest.raises(ModelError):
            load_model(str(cut))


def test_damaged_headers_give_an_error_or_a_model_but_nothing_else(plain, tmp_path):
    whole = plain.read_bytes()
    damaged = tmp_path / "damaged.gguf"
    chance = random.Random(7)
    refused = 0
    for _ in range(300):
        content = bytearray(whole[:6000]) + whole[6000:]
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(4, 6000)] = chance.choice([0, 1, 127, 255])
        damaged.write_bytes(content)
        try:
            read_gguf_model(damaged)
        except ModelError:
            refused += 1
    assert refused > 50


def test_absurd_counts_are_refused_without_being_tried(tmp_path):
    path = tmp_path / "huge.gguf"
    for counts in [(2**63, 1), (1, 2**63)]:
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts))
        with pytest.raises(ModelError, match="claims"):
            read_gguf(path)
    array = struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    for item in (4, 8):  # numbers, strings
        path.write_bytes(b"GGUF" + array + struct.pack("<IIQ", 9, item, 2**60))
        with pytest.raises(ModelError, match="not a readable GGUF"):
            read_gguf(path)
