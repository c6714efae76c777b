"""Modules that people write: in-place operations, own parameters, one tensor read in two ways."""

import pytest
import torch
import torch.nn.functional as F
from test_statistics import gather, pieces_of_four, random  # noqa: F401
from torch import nn

from attar.errors import ModelError

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def two_layers(activation):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), activation, nn.Linear(5, 4))


@pytest.mark.parametrize("kind", [nn.SiLU, nn.ReLU, nn.Hardswish])
def test_an_activation_in_place_after_a_linear_map_changes_no_statistics(kind):
    batches = [{"inputs": random(6, 3)}]
    plain, in_place = (gather(two_layers(kind(inplace=flag)), batches)[1] for flag in (False, True))
    for found in ("channel_activation", "channel_taylor"):
        for name in ("0", "2"):
            assert torch.allclose(
                getattr(plain, found)[name], getattr(in_place, found)[name], **CLOSE
            )
    assert torch.allclose(
        plain.channel_relevance[""]["0"], in_place.channel_relevance[""]["0"], **CLOSE
    )


def test_an_activation_in_place_after_a_convolution_changes_no_statistics():
    def net(flag):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 2), nn.SiLU(inplace=flag), nn.Flatten(), nn.Linear(16, 3)
        )

    batches = [{"pixels": random(5, 2, 3, 3)}]
    plain, in_place = (gather(net(flag), batches)[1] for flag in (False, True))
    assert torch.allclose(plain.channel_activation["0"], in_place.channel_activation["0"], **CLOSE)
    assert torch.allclose(plain.curvatures["0"][0].rows, in_place.curvatures["0"][0].rows, **CLOSE)


class AddsInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.shift = nn.Parameter(torch.ones(4))

    def forward(self, tokens):
        h = self.table(tokens)
        h += self.shift
        return self.head(torch.tanh(h))


def test_an_addition_in_place_after_an_embedding_is_no_hindrance():
    _, found = gather(AddsInPlace(), [{"tokens": torch.tensor([[1, 2, 6], [0, 1, 1]])}], "language")
    assert found.curvatures["table"][0].first.abs().sum() > 0


class ReadsTwice(nn.Module):
    """A convolution and a linear map read the very same tensor, each along another side."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.linear = nn.Conv1d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.convolution(x)[..., :3].mean(1) + self.linear(x).mean(1)


def test_a_convolution_and_a_linear_map_that_read_one_tensor_do_not_share_a_moment():
    x = random(4, 4, 4)
    _, found = gather(ReadsTwice(), [{"inputs": x}])
    flat = x.reshape(-1, 4)
    assert torch.allclose(found.column_power["linear"], flat.square().mean(0), **CLOSE)
    along_channels = found.column_power["convolution"]
    assert torch.allclose(along_channels, x.square().mean((0, 2)), **CLOSE)
    assert found.curvatures["convolution"][0].first is not found.curvatures["linear"][0].first


class OwnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.out_weight = nn.Parameter(torch.randn(3, 4))
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return F.linear(self.layer(x), self.out_weight)


def test_a_weight_that_belongs_to_no_layer_is_left_with_a_reason():
    module = OwnParameter()
    units, found = gather(module, [{"inputs": random(5, 3)}])
    assert [unit.name for unit in units] == ["layer"] == list(found.curvatures)
    assert any(left.name == "out_weight" and left.reason for left in units.leftovers)


def test_a_single_layer_is_refused_with_what_to_do():
    with pytest.raises(ModelError) as found:
        gather(nn.Linear(3, 4), [{"inputs": random(5, 3)}])
    assert "Sequential" in found.value.hint
