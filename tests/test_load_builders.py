import time

import pytest
import torch
from tiny_models import LLAMA, architecture, random_model, state_of
from torch import nn
from transformers import BertConfig, BertModel

from attar.errors import DataError, ModelError
from attar.load.builders import BUILDERS, PICTURE_SETTINGS, TASKS, build_empty, build_module, fill
from attar.load.mobilenet import MobileNetV2
from attar.load.sentence import SentenceEncoder
from attar.records import Architecture

BERT = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 33,
}
WHISPER = {
    "model_type": "whisper",
    "vocab_size": 70,
    "d_model": 16,
    "num_mel_bins": 80,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_source_positions": 1500,
    "max_target_positions": 20,
    "decoder_start_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "begin_suppress_tokens": [],
}
CONFIGS = {
    "causal-language": LLAMA,
    "whisper": WHISPER,
    "sentence-bert": {"bert": BERT, "normalise": True},
    "mobilenetv2": {"classes": 5, "picture": PICTURE_SETTINGS["mobilenetv2"]},
    "efficientnet-lite0": {"classes": 5, "picture": PICTURE_SETTINGS["efficientnet-lite0"]},
}
ALL = pytest.mark.parametrize("builder", BUILDERS)


def random_state(module):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(tensor.shape, generator=generator) * 0.1
        if tensor.is_floating_point()
        else torch.zeros_like(tensor)
        for name, tensor in module.state_dict().items()
        if name not in ("lm_head.weight", "proj_out.weight")  # tied to the embedding
    }


def test_every_builder_is_tested_here():
    assert set(CONFIGS) == set(BUILDERS)


@ALL
def test_a_built_module_is_ready_and_holds_what_it_was_given(builder):
    made = Architecture(builder, CONFIGS[builder])
    empty = build_empty(made)
    state = random_state(empty)
    module = build_module(made, state)
    held = module.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in state.items())
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


@ALL
def test_no_tensor_is_left_without_memory_or_meaning(builder):
    made = Architecture(builder, CONFIGS[builder])
    one, two = (build_module(made, random_state(build_empty(made))) for _ in range(2))
    buffers = dict(two.named_buffers())
    for name, buffer in one.named_buffers():
        assert buffer.device.type == "cpu"
        assert torch.equal(buffer, buffers[name])


def test_tied_weights_are_one_parameter():
    module = build_module(architecture(LLAMA), state_of(random_model(LLAMA)))
    assert module.lm_head.weight is module.model.embed_tokens.weight


def test_untied_weights_are_two():
    config = {**LLAMA, "tie_word_embeddings": False}
    module = build_module(architecture(config), state_of(random_model(config)))
    assert module.lm_head.weight is not module.model.embed_tokens.weight


def test_both_names_of_a_tied_weight_are_accepted_when_they_agree():
    module = random_model(LLAMA)
    state = state_of(module)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    assert build_module(architecture(LLAMA), state).lm_head.weight.shape == (61, 32)
    state["lm_head.weight"] += 1
    with pytest.raises(ModelError, match="are tied"):
        build_module(architecture(LLAMA), state)


def test_logits_are_those_of_transformers():
    module = random_model(LLAMA)
    tokens = torch.arange(14).reshape(2, 7)
    ours = build_module(architecture(LLAMA), state_of(module))
    with torch.no_grad():
        assert torch.equal(
            TASKS["language"].forward(ours, {"tokens": tokens}), module(tokens).logits
        )


def test_half_precision_tensors_become_float32():
    state = {name: tensor.half() for name, tensor in state_of(random_model(LLAMA)).items()}
    module = build_module(architecture(LLAMA), state)
    assert torch.equal(module.model.norm.weight, state["model.norm.weight"].float())


def test_building_costs_no_initialisation():
    config = {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4}
    build_empty(architecture(LLAMA))
    start = time.process_time()
    build_empty(architecture({**config, "num_attention_heads": 256, "num_key_value_heads": 256}))
    # 270 million weights; drawing them at random takes about 2 seconds
    assert time.process_time() - start < 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_tensor(value):
    state = state_of(random_model(LLAMA))
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 NaN or inf"):
        build_module(architecture(LLAMA), state)


def test_missing_unexpected_and_misshapen_tensors_are_named():
    state = state_of(random_model(LLAMA))
    missing = {name: t for name, t in state.items() if name != "model.norm.weight"}
    with pytest.raises(ModelError, match=r"model\.norm\.weight is missing"):
        build_module(architecture(LLAMA), missing)
    with pytest.raises(ModelError, match="holds the tensor extra"):
        build_module(architecture(LLAMA), {**state, "extra": torch.zeros(1)})
    misshapen = {**state, "model.norm.weight": torch.zeros(31)}
    with pytest.raises(ModelError, match=r"shape \(31,\), the configuration needs \(32,\)"):
        build_module(architecture(LLAMA), misshapen)


def test_an_unknown_builder_is_refused_and_nothing_is_imported():
    with pytest.raises(ModelError, match="os:system"):
        build_module(Architecture("os:system", {}), {})
    with pytest.raises(ModelError, match="no builder 'factory'"):
        build_module(Architecture("factory", {"factory": "os:getcwd"}), {})


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "hidden_size": "wide"},
        {"model_type": "no such model"},
        {},
        {"model_type": "bert"},
        {"model_type": "llama", "num_attention_heads": 0},
    ],
)
def test_configurations_that_build_nothing_are_refused(config):
    full = {**LLAMA, **config} if config.get("model_type") == "llama" else config
    kind = "sentence-bert" if config.get("model_type") == "bert" else "causal-language"
    with pytest.raises(ModelError):
        build_module(Architecture(kind, full), {})


def test_a_sentence_is_the_normalised_mean_over_its_own_tokens():
    torch.manual_seed(0)
    settings = {name: value for name, value in BERT.items() if name != "model_type"}
    bert = BertModel(BertConfig(**settings), add_pooling_layer=False).eval()
    encoder = SentenceEncoder(bert, normalise=True)
    tokens = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    with torch.no_grad():
        batch = {"tokens": tokens, "attention": mask}
        vectors = TASKS["embed"].forward(encoder, batch)
        alone = bert(input_ids=tokens[1:, :2]).last_hidden_state[0]
    mean = (alone[0] + alone[1]) / 2
    assert vectors.shape == (2, 1, 24)
    # float32 rounding of a sum in another order
    torch.testing.assert_close(vectors[1, 0], mean / mean.norm(), atol=1e-5, rtol=0)


def test_a_sentence_without_tokens_is_zeros_instead_of_nan():
    made = Architecture("sentence-bert", {"bert": BERT, "normalise": True})
    module = build_module(made, random_state(build_empty(made)))
    tokens = torch.zeros((1, 3), dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(module(tokens, torch.zeros_like(tokens)), torch.zeros(1, 24))


def test_mobilenet_has_the_parameters_and_names_of_torchvision():
    state = MobileNetV2().state_dict()
    n_parameters = sum(p.numel() for p in MobileNetV2().parameters())
    assert n_parameters == 3_504_872
    for name in ("features.0.0.weight", "features.1.conv.1.weight", "features.18.1.running_var"):
        assert name in state
    assert state["features.2.conv.1.0.weight"].shape == (96, 1, 3, 3)
    assert state["classifier.1.weight"].shape == (1000, 1280)


# EfficientNet's padding is fixed for its own size.
@pytest.mark.parametrize(("builder", "side"), [("mobilenetv2", 33), ("efficientnet-lite0", 224)])
def test_vision_models_give_a_logit_for_each_class(builder, side):
    made = Architecture(builder, CONFIGS[builder])
    module = build_module(made, random_state(build_empty(made)))
    with torch.no_grad():
        logits = TASKS["classify"].forward(module, {"pixels": torch.zeros(1, 3, side, side)})
    assert logits.shape == (1, 1, 5)
    assert torch.isfinite(logits).all()


def test_whisper_scores_every_next_token():
    made = Architecture("whisper", WHISPER)
    module = build_module(made, random_state(build_empty(made)))
    batch = {
        "features": torch.zeros(1, 80, 3000),
        "decoder_tokens": torch.tensor([[1, 2, 3]]),
        "mask": torch.ones(1, 3, dtype=torch.bool),
    }
    with torch.no_grad():
        assert TASKS["transcribe"].forward(module, batch).shape == (1, 3, 70)
    assert module.proj_out.weight is module.model.decoder.embed_tokens.weight


def test_a_batch_of_another_kind_is_refused_by_name():
    with pytest.raises(DataError, match="holds pixels, but the model reads tokens"):
        TASKS["language"].forward(nn.Identity(), {"pixels": torch.zeros(1)})


def test_a_plain_module_needs_no_cache_argument():
    module = fill(nn.Embedding(7, 5), {"weight": torch.rand(7, 5)})
    logits = TASKS["language"].forward(module, {"tokens": torch.tensor([[1, 2]])})
    assert logits.shape == (1, 2, 5)
