"""Links are found where a change cannot show, and only there; every method leaves the answer."""

import pytest
import torch
from linked_models import Convolutions, Fused, Grouped, PostNorm, PreNorm, StateSpace, randomised
from tiny_models import GEMMA, LLAMA, random_model

from attar.equalise import FOLDS
from attar.equalise.facts import Facts
from attar.equalise.find import changed, find_links, gains_first
from attar.links import scaling

TOKENS = torch.arange(14).reshape(2, 7)
UNTIED = {**LLAMA, "tie_word_embeddings": False}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def language(config):
    module = random_model(config).double()
    return module, lambda: module(TOKENS, use_cache=False).logits


def plain(kind, *example):
    module = randomised(kind())
    return module, lambda: module(*example)


MODELS = {
    "llama": lambda: language(LLAMA),
    "untied": lambda: language(UNTIED),
    "gemma3": lambda: language(GEMMA),
    "grouped": lambda: plain(Grouped, TOKENS),
    "post-norm": lambda: plain(PostNorm, TOKENS),
    "pre-norm": lambda: plain(PreNorm, drawn(5, 9)),
    "convolutions": lambda: plain(Convolutions, drawn(2, 3, 13, 13)),
    "fused": lambda: plain(Fused, drawn(2, 5, 8)),
    "state-space": lambda: plain(StateSpace, TOKENS),
}


# Transformers' norms compute in float32, whatever they are given; ours in float64.
TOLERANCE = {"llama": 1e-6, "untied": 1e-6, "gemma3": 1e-6}


@pytest.fixture(scope="module")
def found():
    made = {}

    def get(name):
        if name not in made:
            module, run = MODELS[name]()
            made[name] = (module, run, find_links(module, run))
        return made[name]

    return get


def facts(link, seed=0):
    """Something for every field; nothing in it need be true for the answer to stay."""
    low = drawn(link.channels, seed=seed + 1)
    moment = None
    if link.blocks is not None:
        root = drawn(*link.blocks.shape, link.blocks.shape[1], seed=seed + 2)
        moment = root @ root.transpose(1, 2)
    return Facts(
        power=drawn(link.channels, seed=seed).square() + 0.1,
        moment=moment,
        sizes=drawn(link.channels, seed=seed + 3).square() + 0.1,
        mean=drawn(link.channels, seed=seed + 4),
        low=low,
        high=low + drawn(link.channels, seed=seed + 5).abs(),
    )


def stays(model, found, wanted):
    limit = TOLERANCE.get(model, 1e-9) * wanted.abs().max()
    return bool(((found - wanted).abs() <= limit).all())


def kinds(links):
    return {link.name: link.kind for link in links}


def test_llama_has_a_link_before_every_map_but_the_gate(found):
    for name in ("llama", "gemma3"):
        found_kinds = kinds(found(name)[2].links)
        norm = "post_attention" if name == "llama" else "pre_feedforward"
        for layer in (0, 1):
            prefix = f"model.layers.{layer}."
            assert found_kinds[f"{prefix}input_layernorm"] == "norm"
            assert found_kinds[f"{prefix}{norm}_layernorm"] == "norm"
            assert found_kinds[f"{prefix}self_attn.v_proj"] == "values"
            assert found_kinds[f"{prefix}mlp.up_proj"] == "product"
        assert len(found_kinds) == 8


def test_heads_that_share_values_are_turned_together(found):
    (link, *_) = [one for one in found("llama")[2].links if one.kind == "values"]
    assert link.blocks.tolist() == [list(range(8)), list(range(8, 16))]
    # four query heads of eight, two for each key-value head
    assert link.readers[0].reached.tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]


def test_a_product_passes_a_scale_and_no_rotation(found):
    products = [one for one in found("llama")[2].links if one.kind == "product"]
    assert products and all(one.blocks is None and not one.can_shift for one in products)


def test_after_a_residual_norm_nothing_may_change(found):
    _, _, links = found("post-norm")
    assert kinds(links.links) == {"value": "values", "norm2": "norm"}
    assert "added" in links.refused["norm1"]
    assert links.refused["fc1"] == "they enter gelu"
    assert all(link.can_shift for link in links.links)


def test_relu_passes_a_scale_and_relu6_does_not(found):
    _, _, links = found("convolutions")
    assert set(kinds(links.links)) == {"first", "own", "point", "last"}
    assert links.refused["clipped"] == "they enter relu6"
    assert not any(link.can_shift for link in links.links)


def test_of_a_fused_map_only_the_values_are_free(found):
    (link,) = found("fused")[2].links
    assert link.name == "qkv" and link.kind == "values"
    assert link.free.tolist() == [False] * 16 + [True] * 8
    assert not link.can_shift  # shares of its own making may sum to anything


def test_the_stream_turns_where_its_norms_gains_can_go(found):
    assert found("untied")[2].stream is not None
    assert found("state-space")[2].stream is not None
    assert "the head is the table" in found("llama")[2].refused["stream"]
    for name in ("gemma3", "post-norm"):
        assert found(name)[2].stream is None and found(name)[2].refused["stream"]


def test_a_tied_table_turns_where_the_last_gain_is_the_same_for_all():
    module, run = language(LLAMA)
    module.model.norm.weight.data.fill_(1.3)
    stream = find_links(module, run).stream
    assert stream is not None
    assert "model.norm" not in {link.name for link in stream.norms}


def test_a_norm_that_takes_the_mean_off_cannot_be_turned(found):
    assert found("pre-norm")[2].stream is None


def test_a_map_that_is_used_twice_is_left_alone():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.one(torch.relu(self.one(x)))

    module = randomised(Twice())
    links = find_links(module, lambda: module(drawn(3, 4)))
    assert not links.links and "more than once" in links.refused["one"]


def test_what_only_seems_to_pass_is_dropped_by_running_it():
    class Sneaky(torch.nn.Module):
        """Looks at its own weights where no operation shows it."""

        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)

        def forward(self, x):
            size = float(self.one.weight.detach().numpy().sum())
            return self.two(self.one(x)) * size

    module = randomised(Sneaky())
    links = find_links(module, lambda: module(drawn(3, 4)))
    assert not links.links and "changes the answer" in links.refused["one"]


def test_finding_leaves_every_bit():
    module, run = MODELS["untied"]()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    find_links(module, run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", FOLDS)
def test_every_method_leaves_the_answer_of_every_link(found, model, method):
    module, run, links = found(model)
    fold = FOLDS[method]()
    wanted, tried = run(), 0
    for link in (*links.links, *([] if links.stream is None else [links.stream.link])):
        reason = fold.refuses(link)
        if reason is not None:
            assert reason[0].islower() and not reason.endswith(".")
            continue
        steps = [] if link.kind != "stream" else gains_first(links.stream)
        change = fold.change(link, facts(link))
        again = fold.change(link, facts(link))
        assert torch.equal(change.read.by, again.read.by)
        with changed(module, [*steps, (link, change)]):
            assert stays(model, run(), wanted)
        tried += 1
    if model != "fused" and method == "fold_scale":
        assert tried


def test_two_changes_of_one_stream_come_one_after_the_other(found):
    module, run, links = found("untied")
    wanted, stream = run(), links.stream
    turn = FOLDS["fold_hadamard"]().change(stream.link, facts(stream.link))
    norm = next(link for link in links.links if link.kind == "norm")
    scale = scaling(drawn(norm.channels).abs() + 0.5)
    with changed(module, [*gains_first(stream), (stream.link, turn), (norm, scale)]):
        assert stays("untied", run(), wanted)
