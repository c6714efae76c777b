"""A, G and relevance of small nets, against sums by plain loops over one sample at a time."""

import gc
import weakref

import numpy as np
import pytest
import torch
import toys
from torch import nn

from attar.divergence import Divergence
from attar.errors import DataError
from attar.explain import gatherer, moments, statistics
from attar.explain.statistics import gather_statistics, statistics_bytes
from attar.load.units import list_units
from attar.records import Silent

# Means of a few hundred float32 products of numbers around one.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Fixed(Divergence):
    """A gradient that follows from the outputs, so that a second implementation has it too."""

    def sampled_gradient(self, outputs, generator):
        return torch.cos(3 * outputs)


FIXED = Fixed("categorical")


@pytest.fixture(autouse=True)
def pieces_of_four(monkeypatch):
    """The halves below are counted for pieces of this size."""
    sizes = {"language": 1, "transcribe": 1}
    monkeypatch.setattr(statistics, "samples_at_once", lambda task: sizes.get(task, 4))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gather(module, batches, task="classify", divergence=FIXED, **more):
    model = toys.toy(task, module, examples=batches[0])
    units = list_units(model)
    found = gather_statistics(model, units, batches, divergence, seed=0, progress=Silent(), **more)
    return units, found


def by_hand(module, samples, gradient=lambda out: torch.cos(3 * out)):
    """Input, output and gradient at the output of every layer, one sample at a time."""
    parts = []
    for sample in samples:
        seen = {}

        def keep(layer, inputs, output, seen=seen):
            output.retain_grad()
            seen[layer] = (inputs[0].detach().double(), output)

        layers = [
            m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)
        ]
        handles = [layer.register_forward_hook(keep) for layer in layers]
        given = sample[None].requires_grad_() if sample.is_floating_point() else sample[None]
        module.requires_grad_(True)
        out = module(given)
        out.backward(gradient(out.detach()))
        module.requires_grad_(False)
        for handle in handles:
            handle.remove()
        names = {layer: name for name, layer in module.named_modules()}
        parts.append(
            {
                names[m]: (x[0].numpy(), y.detach()[0].double().numpy(), y.grad[0].double().numpy())
                for m, (x, y) in seen.items()
            }
        )
    return parts


def classifier():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))


def weighted_mean(parts, *names):
    """Mean of what enters maps, each counted by its squared gradient."""
    total, mass = 0.0, 0.0
    for part in parts:
        for name in names:
            entering, gradients = (np.atleast_2d(part[name][place]) for place in (0, 2))
            for x, g in zip(entering, gradients, strict=True):
                total, mass = total + (g**2).sum() * x, mass + (g**2).sum()
    return total / mass


def weighted_moment(parts, *names, about=0.0):
    """Mean outer product of what enters maps, each counted by its squared gradient."""
    total, mass = 0.0, 0.0
    for part in parts:
        for name in names:
            entering, gradients = (np.atleast_2d(part[name][place]) for place in (0, 2))
            for x, g in zip(entering, gradients, strict=True):
                total = total + (g**2).sum() * np.outer(x - about, x - about)
                mass += (g**2).sum()
    return total / mass


def test_curvature_of_linear_maps_is_what_loops_sum():
    module, x = classifier(), random(7, 3)
    _, found = gather(module, [{"inputs": x}])
    parts = by_hand(module, x)
    for name in ("0", "2"):
        (curvature,) = found.curvatures[name]
        rows = sum(np.outer(p[name][2], p[name][2]) for p in parts) / 7
        # Pieces of four samples go to the first half and the second in turns.
        assert np.allclose(curvature.rows[0], rows, **CLOSE)
        # A bias takes the mean error away: that of the first half, on which it is rounded.
        mean = weighted_mean(parts[:4], name)
        means = [mean, weighted_mean(parts[4:], name)]
        assert np.allclose(curvature.means, means, **CLOSE)
        first, second = (weighted_moment(half, name, about=mean) for half in (parts[:4], parts[4:]))
        # On other data the mean may be another: a quarter of its square stays.
        may_differ = 0.25 * np.outer(mean, mean)
        assert np.allclose(curvature.first[0], first + may_differ, **CLOSE)
        assert np.allclose(curvature.second[0], second + may_differ, **CLOSE)
        power = sum(p[name][0] ** 2 for p in parts) / 7
        assert np.allclose(found.column_power[name], power, **CLOSE)
    assert found.n_predictions == 7 and found.n_samples == {"": 7}


def test_relevance_of_linear_maps_is_what_loops_sum():
    module, x = classifier(), random(7, 3)
    _, found = gather(module, [{"inputs": x}])
    parts = by_hand(module, x)
    for name in ("0", "2"):
        products = np.array([p[name][1] * p[name][2] for p in parts])
        outputs = np.array([p[name][1] for p in parts])
        channels = found.channel_relevance[""][name]
        assert np.allclose(channels, 0.5 * (products**2).mean(0), **CLOSE)
        whole = found.unit_relevance[""][name]
        assert whole == pytest.approx(0.5 * (products.sum(1) ** 2).mean(), rel=1e-4)
        assert np.allclose(found.channel_activation[name], np.abs(outputs).mean(0), **CLOSE)
        assert np.allclose(found.channel_taylor[name], np.abs(products).mean(0), **CLOSE)


class Picture(nn.Module):
    """A grouped, a depthwise and a plain convolution, then a linear map."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.grouped = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2)
        self.depthwise = nn.Conv2d(6, 6, 2, groups=6)
        self.plain = nn.Conv2d(6, 3, 1)
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        x = torch.tanh(self.depthwise(torch.tanh(self.grouped(x))))
        return self.head(torch.tanh(self.plain(x)).mean((2, 3)))


def patches_by_loops(layer, x):
    """Patch of each output position: `groups positions columns`."""
    (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding
    padded = np.pad(x, ((0, 0), (ph, ph), (pw, pw)))
    each = padded.shape[0] // layer.groups
    found = []
    for group in range(layer.groups):
        channels = padded[group * each : (group + 1) * each]
        found.append(
            [
                channels[:, i : i + kh, j : j + kw].flatten()
                for i in range(0, padded.shape[1] - kh + 1, sh)
                for j in range(0, padded.shape[2] - kw + 1, sw)
            ]
        )
    return np.array(found)


@pytest.mark.parametrize("name", ["grouped", "depthwise", "plain"])
def test_curvature_of_convolutions_is_what_loops_sum_in_each_group(name):
    module, x = Picture(), random(3, 4, 7, 6)
    _, found = gather(module, [{"pixels": x}])
    layer, parts = module.get_submodule(name), by_hand(module, x)
    columns, entered, rows, n_positions = 0.0, 0.0, 0.0, 0
    for part in parts:
        patch = patches_by_loops(layer, part[name][0])
        entered = entered + patch.sum(1)
        g = part[name][2].reshape(layer.groups, layer.out_channels // layer.groups, -1)
        columns = columns + np.einsum("gpc,gpd->gcd", patch, patch)
        rows = rows + np.einsum("grp,gsp->grs", g, g)
        n_positions += patch.shape[1]
    (curvature,) = found.curvatures[name]
    mean = entered / n_positions
    assert np.allclose(curvature.means[0], mean.flatten(), **CLOSE)
    about_mean = columns / n_positions - 0.75 * np.einsum("gc,gd->gcd", mean, mean)
    assert np.allclose(curvature.columns, about_mean, **CLOSE)
    # Positions are independent: G is their sum, A their mean, so that damage is per picture.
    assert np.allclose(curvature.rows, rows / 3, **CLOSE)
    power = (columns / n_positions).diagonal(axis1=1, axis2=2).mean(0)
    assert np.allclose(found.column_power[name], power, **CLOSE)
    products = np.array([(p[name][1] * p[name][2]).sum((1, 2)) for p in parts])
    assert np.allclose(found.channel_relevance[""][name], 0.5 * (products**2).mean(0), **CLOSE)


def test_of_many_positions_some_stand_for_all(monkeypatch):
    monkeypatch.setattr(moments, "POSITIONS_AT_MOST", 6)
    module, x = Picture(), random(2, 4, 9, 8)
    _, found = gather(module, [{"pixels": x}])
    g = [p["grouped"][2].reshape(2, 3, -1) for p in by_hand(module, x)]
    n_positions = g[0].shape[2]
    step = -(-n_positions // 6)
    chosen = [part[:, :, ::step] for part in g]
    rows = sum(np.einsum("grp,gsp->grs", part, part) for part in chosen) / 2
    rows *= n_positions / chosen[0].shape[2]
    assert np.allclose(found.curvatures["grouped"][0].rows, rows, **CLOSE)


class Tied(nn.Module):
    def __init__(self, vocabulary=9, width=4):
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        h = self.table(tokens)
        return self.head(torch.tanh(self.mix(h)) + h)


TOKENS = torch.tensor([[1, 2, 1, 8, 0], [2, 2, 2, 3, 8], [5, 1, 0, 0, 1]])


def hedged(values):
    """A quarter of what is to come may be of another kind: the same list by its roots."""
    roots = np.sqrt(values)
    return 0.75 * values + 0.25 * values.sum() * roots / roots.sum()


def test_a_tied_weight_has_one_curvature_for_each_use():
    module = Tied()
    units, found = gather(module, [{"tokens": TOKENS}], "language")
    assert units.named("table").uses == ("embedding", "linear")
    looked_up, read = found.curvatures["table"]
    parts = by_hand(module, TOKENS)
    gradients = [p["table"][2] for p in parts]
    # One sequence at a time: 1 and 3 in the first half, 2 in the second.
    first = (gradients[0].T @ gradients[0] + gradients[2].T @ gradients[2]) / 10
    assert np.allclose(looked_up.first[0], first, **CLOSE)
    assert np.allclose(looked_up.second[0], gradients[1].T @ gradients[1] / 5, **CLOSE)
    counts = np.bincount(TOKENS.flatten(), minlength=9)
    with torch.no_grad():
        answers = module(TOKENS).softmax(-1).double().mean((0, 1)).numpy()
    assert np.allclose(looked_up.rows, hedged(0.5 * (counts / 15 + answers)), **CLOSE)
    g = np.concatenate([p["head"][2] for p in parts])
    assert np.allclose(read.rows[0], g.T @ g / 15, **CLOSE)
    assert np.allclose(read.second[0], weighted_moment(parts[1:2], "head"), **CLOSE)


def test_relevance_of_a_token_counts_a_sample_once():
    class LookUp(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(4)
            self.table = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 9)

        def forward(self, tokens):
            return self.head(torch.tanh(self.table(tokens)))

    module = LookUp()
    _, found = gather(module, [{"tokens": TOKENS}], "language")
    expected = np.zeros(9)
    for tokens, part in zip(TOKENS.tolist(), by_hand(module, TOKENS), strict=True):
        products = (part["table"][1] * part["table"][2]).sum(1)
        for token in set(tokens):
            expected[token] += (
                sum(p for t, p in zip(tokens, products, strict=True) if t == token) ** 2
            )
    assert np.allclose(found.channel_relevance[""]["table"], 0.5 * expected / 15, **CLOSE)
    assert "table" not in found.column_power


def test_the_rows_of_an_answer_too_many_for_a_matrix_are_exact(monkeypatch):
    monkeypatch.setattr(gatherer, "FULL_ROWS_LIMIT", 3)
    module, x = classifier(), random(7, 3)
    _, found = gather(module, [{"inputs": x}])
    with torch.no_grad():
        p = module(x).softmax(-1).double()
    expected = hedged((p * (1 - p)).mean(0).numpy())
    assert np.allclose(found.curvatures["2"][0].rows, expected, **CLOSE)
    g = np.array([part["0"][2] for part in by_hand(module, x)])
    assert np.allclose(found.curvatures["0"][0].rows, (g**2).mean(0), **CLOSE)


def test_columns_too_many_for_a_matrix_keep_the_diagonal(monkeypatch):
    module, x = Picture(), random(5, 4, 7, 6)
    full = gather(module, [{"pixels": x}])[1].curvatures
    monkeypatch.setattr(gatherer, "FULL_COLUMNS_LIMIT", 2)
    units, found = gather(module, [{"pixels": x}])
    for unit in units:
        diagonal = full[unit.name][0].first.diagonal(dim1=1, dim2=2).flatten()
        assert torch.allclose(found.curvatures[unit.name][0].first, diagonal, **CLOSE)
        assert found.column_power[unit.name].shape == (unit.columns,)


class Attention(nn.Module):
    """Three maps read one tensor, a fourth joins heads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.head_dim = 2
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(6, 6)
        self.o_proj = nn.Linear(6, 6)

    def forward(self, x):
        q, v = self.q(x), self.v(x)
        scores = torch.softmax(self.k(x).sum(-1, keepdim=True) * q, 1)
        return self.o_proj((scores * v).flatten(2)).sum(1)


class AroundAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        return self.attention(x)


def test_maps_that_read_one_tensor_share_one_moment():
    module, x = AroundAttention(), random(5, 3, 6)
    _, found = gather(module, [{"inputs": x}, {"inputs": x + 1}])
    names = [f"attention.{name}" for name in ("q", "k", "v")]
    q, k, v = (found.curvatures[name][0] for name in names)
    assert q.first is k.first is v.first and q.second is k.second is v.second
    assert found.curvatures["attention.o_proj"][0].first is not q.first
    # Pieces of 4 and 1 samples, twice: the first half has the fours.
    halves = [torch.cat([x[:4], x[:4] + 1]), torch.cat([x[4:], x[4:] + 1])]
    mean = weighted_mean(by_hand(module, halves[0]), *names)
    for found_half, half in zip((q.first, q.second), halves, strict=True):
        about_mean = weighted_moment(by_hand(module, half), *names, about=mean)
        may_differ = 0.25 * np.outer(mean, mean)
        assert np.allclose(found_half[0], about_mean + may_differ, **CLOSE)


def test_of_maps_that_read_one_tensor_only_those_with_a_bias_leave_its_mean_out():
    module = AroundAttention()
    module.attention.k.bias = None
    x = random(5, 3, 6) + 2
    units, found = gather(module, [{"inputs": x}, {"inputs": x + 1}])
    q, k, v = (found.curvatures[f"attention.{name}"][0] for name in ("q", "k", "v"))
    assert [units.named(f"attention.{name}").bias for name in ("q", "k")] == [
        "attention.q.bias",
        "",
    ]
    assert q.first is v.first and k.first is not q.first and k.means is None
    mean = q.means[0]
    assert np.allclose(k.first[0], q.first[0] + 0.75 * torch.outer(mean, mean), **CLOSE)


def test_an_input_whose_answer_does_not_matter_does_not_count():
    class Ignores(nn.Module):
        """The second half of the positions is thrown away; they have inputs of any size."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.map, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

        def forward(self, x):
            return self.head(torch.tanh(self.map(x)[:, :2].mean(1)))

    x = random(6, 4, 3)
    x[:, 2:] *= 1e4
    _, found = gather(Ignores(), [{"inputs": x}])
    _, kept = gather(Ignores(), [{"inputs": x[:, :2]}])
    assert torch.allclose(
        found.curvatures["map"][0].columns, kept.curvatures["map"][0].columns, **CLOSE
    )
    assert float(found.column_power["map"].mean()) > 1e6  # but all inputs are there


def test_a_map_whose_answer_is_thrown_away_has_no_moment():
    class Wasteful(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.used, self.unused = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x):
            self.unused(x + 1)
            return self.used(x)

    _, found = gather(Wasteful(), [{"inputs": random(6, 3)}])
    (curvature,) = found.curvatures["unused"]
    assert float(curvature.columns.abs().sum()) == float(curvature.rows.abs().sum()) == 0
    assert float(found.column_power["unused"].min()) > 0


def test_relevance_of_heads_is_the_slope_of_scaling_each():
    module, x = AroundAttention(), random(4, 3, 6)
    units, found = gather(module, [{"inputs": x}])
    assert units.named("attention.o_proj").heads == 3
    weight = module.attention.o_proj.weight.detach().double().numpy()
    expected = np.zeros(3)
    for part in by_hand(module, x):
        entering, _, g = part["attention.o_proj"]
        products = ((g @ weight) * entering).sum(0).reshape(3, 2).sum(1)
        expected += products**2
    assert np.allclose(found.head_relevance[""]["attention.o_proj"], 0.5 * expected / 4, **CLOSE)


def test_slices_add_up_to_the_whole():
    module, x = classifier(), random(11, 3)
    labels = [["a", "b", "b", "a", "c", "a", "b", "b", "a", "a", "c"]]
    _, found = gather(module, [{"inputs": x}], slices=labels)
    assert found.n_samples == {"": 11, "a": 5, "b": 4, "c": 2}
    for name in ("0", "2"):
        parts = [found.n_samples[s] * found.channel_relevance[s][name] for s in "abc"]
        assert torch.allclose(sum(parts), 11 * found.channel_relevance[""][name], **CLOSE)
        wholes = [found.n_samples[s] * found.unit_relevance[s][name] for s in "abc"]
        assert sum(wholes) == pytest.approx(11 * found.unit_relevance[""][name], rel=1e-5)
    chosen = torch.tensor([i for i, label in enumerate(labels[0]) if label == "b"])
    alone = gather(module, [{"inputs": x[chosen]}])[1]
    assert torch.allclose(
        found.channel_relevance["b"]["0"], alone.channel_relevance[""]["0"], **CLOSE
    )


def test_padding_is_no_prediction():
    module = Tied()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    _, found = gather(module, [{"tokens": TOKENS[:2], "mask": mask}], "language")
    assert found.n_predictions == 7
    parts = [
        by_hand(module, TOKENS[i : i + 1], lambda out, i=i: torch.cos(3 * out) * mask[i, :, None])[
            0
        ]
        for i in range(2)
    ]
    g = np.concatenate([p["head"][2] for p in parts])
    assert np.allclose(found.curvatures["table"][1].rows[0], g.T @ g / 7, **CLOSE)


def test_more_draws_are_averaged():
    x = random(6, 3)
    one, three = (gather(classifier(), [{"inputs": x}], draws=n)[1] for n in (1, 3))
    for name in ("0", "2"):
        assert torch.allclose(one.curvatures[name][0].rows, three.curvatures[name][0].rows, **CLOSE)
        assert torch.allclose(
            one.curvatures[name][0].first, three.curvatures[name][0].first, **CLOSE
        )
        assert torch.allclose(one.channel_taylor[name], three.channel_taylor[name], **CLOSE)
    tied = [gather(Tied(), [{"tokens": TOKENS}], "language", draws=n)[1] for n in (1, 2)]
    one, two = (found.curvatures["table"] for found in tied)
    for a, b in zip(one, two, strict=True):
        assert torch.allclose(a.rows, b.rows, **CLOSE) and torch.allclose(a.first, b.first, **CLOSE)


def test_the_same_seed_gives_the_same_statistics():
    x, plain = random(6, 3), Divergence("categorical")
    one, two = (gather(classifier(), [{"inputs": x}], divergence=plain)[1] for _ in range(2))
    assert torch.equal(one.curvatures["0"][0].rows, two.curvatures["0"][0].rows)


def test_how_the_data_is_batched_changes_nothing_but_the_halves():
    module, x = classifier(), random(12, 3)
    one = gather(module, [{"inputs": x}])[1]
    two = gather(module, [{"inputs": x[:4]}, {"inputs": x[4:]}])[1]
    assert torch.equal(one.curvatures["0"][0].rows, two.curvatures["0"][0].rows)


def test_a_single_piece_of_data_stands_for_both_halves():
    _, found = gather(classifier(), [{"inputs": random(3, 3)}])
    assert found.curvatures["0"][0].first is found.curvatures["0"][0].second
    assert torch.equal(found.curvatures["0"][0].columns, found.curvatures["0"][0].first)


def test_nothing_of_earlier_data_stays_alive():
    seen, alive = [], []

    class Noted(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 5), nn.Linear(5, 4)

        def forward(self, x):
            alive.append(sum(ref() is not None for ref in seen))
            hidden = torch.tanh(self.one(x))
            seen.append(weakref.ref(hidden))
            return self.two(hidden)

    gather(Noted(), [{"inputs": random(4, 3, seed=n)} for n in range(12)])
    assert len(alive) >= 12 and max(alive) <= 1


def test_a_weight_that_only_the_second_stream_uses_is_priced():
    class Choosy(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.always, self.sometimes = nn.Linear(3, 5), nn.Linear(5, 5)
            self.head = nn.Linear(5, 4)

        def forward(self, x):
            hidden = torch.tanh(self.always(x))
            return self.head(self.sometimes(hidden) if bool((x[:, 0] > 0).any()) else hidden)

    x = random(8, 3).abs()
    x[:4, 0] *= -1  # the first piece of four
    model = toys.toy("classify", Choosy(), examples={"inputs": x[4:]})
    found = gather_statistics(
        model, list_units(model), [{"inputs": x}], FIXED, seed=0, progress=Silent()
    )
    (curvature,) = found.curvatures["sometimes"]
    assert curvature.first is curvature.second and float(curvature.rows_mean) > 0


def near(one, two):
    """Whether two moments differ by less than a thousandth of their diagonals."""
    root = one.diagonal(dim1=1, dim2=2).sqrt()
    return bool(((one - two).abs() <= 1e-3 * root[:, None] * root[:, :, None] + 1e-12).all())


def test_moments_kept_by_half_are_the_same(monkeypatch):
    module, x = classifier(), random(9, 3)
    _, whole = gather(module, [{"inputs": x}])
    monkeypatch.setattr(gatherer, "KEPT_BY_HALF_FROM", 2)
    _, half = gather(module, [{"inputs": x}])
    for name in ("0", "2"):
        (one,), (two,) = whole.curvatures[name], half.curvatures[name]
        assert near(one.first, two.first) and near(one.second, two.second)
        assert near(one.rows, two.rows) and near(one.rows_first, two.rows_first)


def test_rows_are_known_in_halves_of_different_samples():
    module, x = classifier(), random(8, 3)
    _, both = gather(module, [{"inputs": x[i : i + 1]} for i in range(8)])
    (curvature,) = both.curvatures["2"]
    halves = curvature.rows_first, curvature.rows_second
    assert torch.allclose(0.5 * (halves[0] + halves[1]), curvature.rows, **CLOSE)
    assert not torch.allclose(*halves, **CLOSE)
    _, alone = gather(module, [{"inputs": x[:1]}])  # one piece: there is no other half
    assert alone.curvatures["2"][0].rows_first is None


def test_statistics_that_nobody_keeps_are_freed():
    """The graph of the last piece holds hooks, and they the sums; a cycle that nobody can see."""
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4))
    _, found = gather(module, [{"inputs": random(8, 3)}])
    held = weakref.ref(found.curvatures["1"][0].rows)
    del found
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("task", ["classify", "language"])
def test_statistics_are_the_same_on_any_number_of_threads(task):
    module = classifier() if task == "classify" else Tied()
    batches = [{"inputs": random(9, 3)}] if task == "classify" else [{"tokens": TOKENS}]
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(gather(module, batches, task, Divergence("categorical"))[1])
    torch.set_num_threads(before)
    for name, (curvature, *_) in found[0].curvatures.items():
        for other in found[1:]:
            again = other.curvatures[name][0]
            assert torch.equal(curvature.rows, again.rows)
            assert torch.equal(curvature.first, again.first)
            assert torch.equal(curvature.second, again.second)


def test_the_module_is_left_as_it_was():
    module = classifier()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    gather(module, [{"inputs": random(6, 3)}])
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert all(not p.requires_grad and p.grad is None for p in module.parameters())


def test_answers_that_are_not_finite_are_refused():
    module = classifier()
    with torch.no_grad():
        module[2].bias[0] = float("nan")
    with pytest.raises(DataError, match="NaN or infinity"):
        gather(module, [{"inputs": random(3, 3)}])


def test_statistics_never_need_more_than_what_was_forecast():
    units, found = gather(Tied(), [{"tokens": TOKENS}], "language")
    held = sum(
        tensor.nbytes
        for curvatures in found.curvatures.values()
        for c in curvatures
        for tensor in (c.rows, c.first, c.second)
    )
    assert held <= statistics_bytes(units) <= 3 * held
