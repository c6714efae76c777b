import pytest
import torch
from tiny_models import GEMMA, LLAMA, architecture, random_model, state_of

from attar.errors import ModelError
from attar.load.builders import build_module
from attar.load.degrid import degrid

UNTIED = {**LLAMA, "tie_word_embeddings": False}
BIASED = {**LLAMA, "attention_bias": True, "mlp_bias": True}
SHAPES = pytest.mark.parametrize(
    "config", [LLAMA, UNTIED, BIASED, GEMMA], ids=["llama", "untied", "biased", "gemma3"]
)


def logits(config, state):
    tokens = torch.arange(14).reshape(2, 7) % config["vocab_size"]
    with torch.no_grad():
        return build_module(architecture(config), state)(tokens, use_cache=False).logits


@SHAPES
def test_logits_stay_the_same_to_float32_rounding(config):
    state = state_of(random_model(config))
    before, after = logits(config, state), logits(config, degrid(state, config, seed=0))
    # 2 layers of width 32: a few hundred roundings of 6e-8 each, relative to the largest logit
    assert (before - after).abs().max() <= 2e-5 * before.abs().max()
    assert not torch.equal(before, after)


@SHAPES
def test_every_linear_map_of_a_layer_changes(config):
    state = state_of(random_model(config))
    new = degrid(state, config, seed=3)
    same = {name for name in state if torch.equal(state[name], new[name])}
    projections = {name for name in state if "_proj.weight" in name or "lm_head" in name}
    assert projections and not projections & same
    assert "model.embed_tokens.weight" in same


def test_factors_stay_within_a_quarter():
    state = state_of(random_model(LLAMA))
    ratio = degrid(state, LLAMA, seed=1)["model.layers.0.input_layernorm.weight"]
    ratio = ratio / state["model.layers.0.input_layernorm.weight"]
    assert 0.799 < ratio.min() < 0.9 and 1.1 < ratio.max() < 1.251


def test_the_seed_decides_every_bit():
    state = state_of(random_model(GEMMA))
    name = "model.layers.1.mlp.down_proj.weight"
    first, again, other = (degrid(state, GEMMA, seed=s)[name] for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_given_state_is_not_touched():
    state = state_of(random_model(LLAMA))
    before = {name: tensor.clone() for name, tensor in state.items()}
    degrid(state, LLAMA, seed=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.items())


def test_four_bit_rounding_error_appears_off_the_grid():
    state = state_of(random_model(LLAMA))
    name = "model.layers.0.mlp.gate_proj.weight"
    state[name] = four_bits(state[name])
    on_grid = (four_bits(state[name]) - state[name]).norm() / state[name].norm()
    weight = degrid(state, LLAMA, seed=0)[name]
    off_grid = (four_bits(weight) - weight).norm() / weight.norm()
    assert on_grid < 1e-6
    assert 0.04 < off_grid < 0.2


def four_bits(weight):
    groups = weight.reshape(-1, 32)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / 15
    return (((groups - low) / step).round() * step + low).reshape(weight.shape)


def test_another_architecture_is_refused_by_name():
    with pytest.raises(ModelError, match="gpt2"):
        degrid({}, {"model_type": "gpt2"}, seed=0)
