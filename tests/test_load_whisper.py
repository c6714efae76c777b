import math
import random
import struct

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from attar.errors import DataError, ModelError
from attar.load.builders import build_module
from attar.load.mel import log_mel, mel_filters
from attar.load.whisper import read_ctranslate2, whisper_config, whisper_state
from attar.records import Architecture

SIZES = {
    "vocab_size": 51865,
    "d_model": 12,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 28,
    "max_source_positions": 1500,
    "max_target_positions": 9,
}


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    whisper = WhisperForConditionalGeneration(WhisperConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in whisper.parameters():
            parameter.copy_(torch.randn_like(parameter).mul(0.1).half())
    return whisper


def encode_name(name):
    content = name.encode() + b"\0"
    return struct.pack("<H", len(content)) + content


def write_ctranslate2(module):
    """As CTranslate2's converter writes a Whisper: q, k and v stacked, k with a bias of zeros."""
    variables = {}
    config = module.config
    for part, heads in (("encoder", 3), ("decoder", 2)):
        stack = getattr(module.model, part)
        variables[f"{part}/num_heads"] = np.array(heads, np.int16)
        variables[f"{part}/pre_norm"] = np.array(1, np.int8)
        variables[f"{part}/position_encodings/encodings"] = half(stack.embed_positions.weight)
        add_norm(variables, f"{part}/layer_norm", stack.layer_norm)
        for number, layer in enumerate(stack.layers):
            add_layer(variables, f"{part}/layer_{number}", layer)
    for name in ("conv1", "conv2"):
        add_linear(variables, f"encoder/{name}", getattr(module.model.encoder, name))
    variables["decoder/embeddings/weight"] = half(module.model.decoder.embed_tokens.weight)
    assert config.d_model == 12
    content = (
        struct.pack("<I", 6) + encode_name("WhisperSpec") + struct.pack("<II", 3, len(variables))
    )
    codes = {"float16": 4, "int8": 1, "int16": 2}
    for name, array in variables.items():
        content += encode_name(name) + struct.pack("<B", array.ndim)
        content += struct.pack(f"<{array.ndim}I", *array.shape)
        content += struct.pack("<BI", codes[array.dtype.name], array.nbytes) + array.tobytes()
    return content


def half(tensor):
    return tensor.detach().numpy().astype(np.float16)


def add_norm(variables, name, norm):
    variables[f"{name}/gamma"], variables[f"{name}/beta"] = half(norm.weight), half(norm.bias)


def add_linear(variables, name, *maps):
    biases = [m.bias if m.bias is not None else torch.zeros(m.weight.shape[0]) for m in maps]
    variables[f"{name}/weight"] = np.concatenate([half(m.weight) for m in maps])
    variables[f"{name}/bias"] = np.concatenate([half(bias) for bias in biases])


def add_layer(variables, name, layer):
    own = layer.self_attn
    add_norm(variables, f"{name}/self_attention/layer_norm", layer.self_attn_layer_norm)
    add_linear(variables, f"{name}/self_attention/linear_0", own.q_proj, own.k_proj, own.v_proj)
    add_linear(variables, f"{name}/self_attention/linear_1", own.out_proj)
    add_norm(variables, f"{name}/ffn/layer_norm", layer.final_layer_norm)
    add_linear(variables, f"{name}/ffn/linear_0", layer.fc1)
    add_linear(variables, f"{name}/ffn/linear_1", layer.fc2)
    if hasattr(layer, "encoder_attn"):
        cross = layer.encoder_attn
        add_norm(variables, f"{name}/attention/layer_norm", layer.encoder_attn_layer_norm)
        add_linear(variables, f"{name}/attention/linear_0", cross.q_proj)
        add_linear(variables, f"{name}/attention/linear_1", cross.k_proj, cross.v_proj)
        add_linear(variables, f"{name}/attention/linear_2", cross.out_proj)


def test_a_ctranslate2_file_becomes_the_same_whisper(module):
    variables = read_ctranslate2(write_ctranslate2(module))
    config = whisper_config(variables, {"suppress_ids": [5], "suppress_ids_begin": [6]})
    assert {name: config[name] for name in SIZES} == SIZES
    assert (config["suppress_tokens"], config["begin_suppress_tokens"]) == ([5], [6])
    ours = build_module(Architecture("whisper", config), whisper_state(variables))
    features, tokens = torch.randn(1, 80, 3000), torch.tensor([[50258, 3, 4]])
    with torch.no_grad():
        truth = module(input_features=features, decoder_input_ids=tokens).logits
        assert torch.equal(ours(input_features=features, decoder_input_ids=tokens).logits, truth)


def test_a_file_cut_anywhere_is_refused(module):
    whole = write_ctranslate2(module)
    chance = random.Random(0)
    for place in [0, 3, 10, 25, 40, *(chance.randrange(len(whole)) for _ in range(20))]:
        with pytest.raises(ModelError, match="not a readable CTranslate2 file"):
            read_ctranslate2(whole[:place])


def test_damaged_headers_give_an_error_or_variables_but_nothing_else(module):
    whole = write_ctranslate2(module)
    chance = random.Random(1)
    refused = 0
    for _ in range(100):
        content = bytearray(whole[:400])
        content[chance.randrange(400)] = chance.choice([0, 1, 128, 255])
        try:
            variables = read_ctranslate2(bytes(content) + whole[400:])
            whisper_config(variables, {})
            whisper_state(variables)
        except ModelError:
            refused += 1
    assert refused > 10


def test_a_missing_variable_is_named(module):
    variables = read_ctranslate2(write_ctranslate2(module))
    del variables["encoder/conv1/weight"]
    with pytest.raises(ModelError, match="encoder/conv1/weight"):
        whisper_config(variables, {})
    with pytest.raises(ModelError, match="surprise"):
        whisper_state({"decoder/surprise/weight": torch.zeros(1)})


@pytest.mark.parametrize("count", [1, 401, 16_000 * 7 + 3, 16_000 * 31])
def test_log_mel_is_that_of_transformers(count):
    from transformers import WhisperFeatureExtractor

    time = torch.arange(count) / 16_000
    samples = torch.sin(2 * math.pi * 440 * time) * torch.rand(count) * 0.5
    truth = WhisperFeatureExtractor()(samples.numpy(), sampling_rate=16_000, return_tensors="pt")
    ours = log_mel(samples)
    assert ours.shape == (80, 3000)
    # transformers transforms in float32 too; one step of log10 near the floor is 1e-4 or less
    torch.testing.assert_close(ours, truth.input_features[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("mel_bins", [80, 128])
def test_mel_filters_are_triangles_drawn_by_a_plain_loop(mel_bins):
    def hertz(mel):
        return 200 / 3 * mel if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)

    top = 15 + math.log(8) * 27 / math.log(6.4)
    corners = [hertz(top * i / (mel_bins + 1)) for i in range(mel_bins + 2)]
    filters = mel_filters(mel_bins)
    for row in range(mel_bins):
        left, middle, right = corners[row : row + 3]
        for column in range(201):
            frequency = 40.0 * column
            rise = (frequency - left) / (middle - left)
            fall = (right - frequency) / (right - middle)
            height = max(0.0, min(rise, fall)) * 2 / (right - left)
            assert abs(float(filters[row, column]) - height) < 1e-12


def test_silence_is_finite_and_no_sound_is_refused():
    assert torch.isfinite(log_mel(torch.zeros(100))).all()
    with pytest.raises(DataError, match="no samples"):
        log_mel(torch.zeros(0))
