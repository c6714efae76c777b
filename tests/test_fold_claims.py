"""What each paper says its change does, on a toy: less is lost at the same number of bits."""

import math

import pytest
import torch
from linked_models import Grouped, PreNorm, StateSpace, randomised

from attar.equalise.facts import Facts
from attar.equalise.find import changed, find_links, gains_first
from attar.equalise.fold_hadamard import FoldHadamard, hadamard
from attar.equalise.fold_karhunen_loeve import FoldKarhunenLoeve
from attar.equalise.fold_reassembly import FoldReassembly
from attar.equalise.fold_scale import FoldScale
from attar.equalise.fold_shift import FoldShift
from attar.sites import watched

TOKENS = torch.randint(0, 23, (6, 20), generator=torch.Generator().manual_seed(0))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest(x, low, high, bits):
    """Round to 2**bits steps from low to high."""
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    return ((x - low) / step).round().clamp(0, 2**bits - 1) * step + low


def rounded(module, run, weight_bits, input_bits=None, only=None, group=None):
    """Run with the weights of linear maps rounded per row, or per group of columns of a row, and
    their inputs with one step for all."""

    def visit(call):
        if call.operation != "linear" or (only is not None and call.name not in only):
            return call.run()
        x, weight = call.input, call.arguments["weight"]
        rows = weight.reshape(-1, group or weight.shape[1])
        if weight_bits is not None:
            reach = rows.abs().amax(1, keepdim=True)
            rows = nearest(rows, -reach, reach, weight_bits)
        if input_bits is not None:
            x = nearest(x, x.min(), x.max(), input_bits)
        return call.function(x, rows.reshape(weight.shape), call.arguments.get("bias"))

    with torch.no_grad(), watched(module, visit):
        return run()


def inputs_of(module, run, link):
    """What meets the channels of a link, over all its readers, `channels positions`."""
    seen = []

    def visit(call):
        for reader in link.readers:
            if reader.weight == call.name:
                flat = call.input.reshape(-1, call.input.shape[-1])
                seen.append(flat[:, reader.reached.argsort()].T)
        return call.run()

    with torch.no_grad(), watched(module, visit):
        run()
    return torch.cat(seen, 1)


def facts(module, run, link):
    x = inputs_of(module, run, link)
    state = dict(module.named_parameters())
    read = [state[reader.weight].T[reader.reached.argsort()] for reader in link.readers]
    writer = link.writers[0]
    written = None
    if writer.side == "rows" and link.kind == "linear":
        written = torch.cat([state[writer.weight], state[writer.bias][:, None]], 1)
    return Facts(
        power=x.square().mean(1),
        moment=(x @ x.T / x.shape[1])[None],
        sizes=torch.cat(read, 1).norm(dim=1),
        mean=x.mean(1),
        low=x.amin(1),
        high=x.amax(1),
        written=written,
        read=torch.cat(read, 1),
    )


def link_of(module, run, name):
    return next(link for link in find_links(module, run).links if link.name == name)


def lost(found, wanted):
    return float((found - wanted).square().mean())


def divergence(found, wanted):
    one, two = wanted.log_softmax(-1), found.log_softmax(-1)
    return float((one.exp() * (one - two)).sum(-1).mean())


@pytest.mark.parametrize(("bits", "share"), [(3, 0.9), (4, 0.5)])
def test_awq_scales_searched_on_activations_beat_rounding_to_nearest(bits, share):
    """AWQ (275): at the same bits and groups, a language model with a few large channels."""
    module = randomised(Grouped(width=24, inner=36), seed=3)
    for norm in (module.norm1, module.norm2, module.norm3):
        norm.weight.data[:3] *= 12  # few channels hold most of what enters
    for layer, by in ((module.head, 0.3), (module.o_proj, 0.5), (module.down, 0.3)):
        layer.weight.data *= by  # so that rounding does not ruin it
    run = lambda: module(TOKENS)  # noqa: E731
    wanted = run()
    plain = divergence(rounded(module, run, bits, group=12), wanted)
    links = [one for one in find_links(module, run).links if one.kind == "norm"]
    best = plain
    for alpha in (0.25, 0.5, 0.75):
        steps = [(one, FoldScale(alpha).change(one, facts(module, run, one))) for one in links]
        with changed(module, steps):
            assert lost(run(), wanted) < 1e-18
            best = min(best, divergence(rounded(module, run, bits, group=12), wanted))
    assert best < share * plain


def test_outlier_suppression_lowers_six_bit_error():
    """Outlier Suppression+ (60): W6A6 min-max, with channels that are asymmetric and far apart."""
    module = randomised(PreNorm(width=24, inner=32), seed=4)
    module.norm.bias.data[2] += 25.0
    module.norm.bias.data[7] -= 18.0
    module.norm.weight.data[5] *= 9
    x = drawn(200, 24)
    run = lambda: module(x)  # noqa: E731
    wanted = run()
    plain = lost(rounded(module, run, 6, 6, only={"fc1.weight"}), wanted)
    link = link_of(module, run, "norm")
    known = facts(module, run, link)
    found = {}
    for name, fold in (("shift", FoldShift()), ("both", FoldShift(cap=1.5))):
        with changed(module, [(link, fold.change(link, known))]):
            assert lost(run(), wanted) < 1e-18
            found[name] = lost(rounded(module, run, 6, 6, only={"fc1.weight"}), wanted)
    assert found["both"] < found["shift"] < plain
    assert found["both"] < 0.3 * plain


def test_reassembly_lowers_four_bit_error_at_the_same_number_of_channels():
    """QLLM (9): W4A4, one channel far larger than the others, some that others stand for."""
    module = randomised(PreNorm(width=10, inner=24), seed=5)
    with torch.no_grad():
        for twin, one, by in ((20, 3, 1.0), (21, 8, 0.5), (22, 9, 2.0)):
            module.fc1.weight[twin] = by * module.fc1.weight[one]
            module.fc1.bias[twin] = by * module.fc1.bias[one]
        module.fc1.weight[23], module.fc1.bias[23] = 0.0, 0.0
        module.fc1.weight[0] *= 16
        module.fc1.bias[0] *= 16
        module.fc2.weight[:, 0] /= 16
    x = drawn(200, 10)
    run = lambda: module(x)  # noqa: E731
    wanted = run()
    plain = lost(rounded(module, run, 4, 4, only={"fc2.weight"}), wanted)
    link = link_of(module, run, "fc1")
    change = FoldReassembly(theta=2.0).change(link, facts(module, run, link))
    with changed(module, [(link, change)]):
        assert lost(run(), wanted) < 1e-18
        parts = inputs_of(module, run, link)
        same = (parts == parts[:1]).all(1)  # what the large channel was split into
        assert 2 <= int(same.sum()) <= 5
        split = lost(rounded(module, run, 4, 4, only={"fc2.weight"}), wanted)
    assert split < 0.5 * plain


def test_where_nothing_gives_up_a_place_reassembly_changes_nothing():
    module = randomised(PreNorm(), seed=6)
    run = lambda: module(drawn(20, 9))  # noqa: E731
    link = link_of(module, run, "fc1")
    change = FoldReassembly().change(link, facts(module, run, link))
    assert torch.equal(change.read.by[0], torch.eye(link.channels, dtype=torch.float64))


def state_space(seed):
    """A Mamba whose stream has one strong direction that all channels share."""
    module = randomised(StateSpace(width=16), seed=seed)
    signs = torch.sign(drawn(16, seed=99 + seed))
    with torch.no_grad():
        module.table.weight += 8 * torch.outer(drawn(29, seed=seed + 9), signs)
        for block in module.blocks:
            block.norm.weight[:2] *= 4
    return module, lambda: module(TOKENS)


def test_rotations_lower_the_error_of_a_state_space_model():
    """MambaQuant (62): W8A8 and W4A4 of what reads the stream; the KLT before Hadamard is best.

    Over six models, geometric mean: of a single one, chance decides between the two rotations.
    """
    errors = {}
    for seed in range(6):
        module, run = state_space(seed)
        wanted, stream = run(), find_links(module, run).stream
        only, first = {reader.weight for reader in stream.link.readers}, gains_first(stream)
        with changed(module, first):
            known = facts(module, run, stream.link)
        turns = {
            "hadamard": [(stream.link, FoldHadamard().change(stream.link, known))],
            "klt": [(stream.link, FoldKarhunenLoeve().change(stream.link, known))],
        }
        for bits in (8, 4):
            for name, turn in {"plain": [], **turns}.items():
                with changed(module, [*first, *turn] if turn else []):
                    assert lost(run(), wanted) < 1e-18
                    error = lost(rounded(module, run, bits, bits, only=only), wanted)
                errors[bits, name] = errors.get((bits, name), 0.0) + math.log(error) / 6
    for bits in (8, 4):
        assert errors[bits, "klt"] < errors[bits, "hadamard"] < errors[bits, "plain"]
        assert math.exp(errors[bits, "klt"] - errors[bits, "plain"]) < 0.7


def test_after_both_rotations_every_channel_has_the_same_power():
    module, run = state_space(0)
    stream = find_links(module, run).stream
    first = gains_first(stream)
    with changed(module, first):
        known = facts(module, run, stream.link)
        before = known.power
    with changed(module, [*first, (stream.link, FoldKarhunenLoeve().change(stream.link, known))]):
        after = facts(module, run, stream.link).power
    assert before.max() / before.min() > 2
    torch.testing.assert_close(after, after.mean().expand(len(after)))
    with changed(
        module, [*first, (stream.link, FoldKarhunenLoeve(spread=False).change(stream.link, known))]
    ):
        axes = facts(module, run, stream.link).moment[0]
    off = axes - torch.diag(axes.diagonal())
    assert off.abs().max() < 1e-9 * axes.max()


@pytest.mark.parametrize("size", [1, 2, 3, 8, 12, 33])
def test_a_hadamard_matrix_is_orthogonal_and_even_where_it_can_be(size):
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    if size in (1, 2, 8):
        torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))
