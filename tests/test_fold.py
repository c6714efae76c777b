import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attar.errors import ModelError
from attar.load.fold import fold_again, fold_batch_norm, folded_weight


def settle(module, seed=0):
    """Give every norm statistics and gains that matter, and every tensor a value."""
    torch.manual_seed(seed)
    for one in module.modules():
        if isinstance(one, nn.BatchNorm1d | nn.BatchNorm2d):
            one.running_mean.normal_()
            one.running_var.uniform_(0.3, 3)
            if one.affine:
                one.weight.data.normal_()
                one.bias.data.normal_()
    return module.eval().requires_grad_(requires_grad=False)


class SameConv(nn.Conv2d):
    """Pads in its own forward, as EfficientNet-Lite's convolutions do."""

    def forward(self, x):
        height = x.size()[-2]
        side = max((-(-height // self.stride[0]) - 1) * self.stride[0] + 3 - height, 0)
        if side > 0:
            x = F.pad(x, [side // 2, side - side // 2, side // 2, side - side // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = SameConv(3, 6, 3, stride=2, bias=False)
        self.stem_norm = nn.BatchNorm2d(6, eps=1e-3)
        self.wide = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.wide_norm = nn.BatchNorm2d(6, affine=False)
        self.act = nn.ReLU6(inplace=True)
        self.head = nn.Linear(6, 5, bias=False)
        self.head_norm = nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.act(self.stem_norm(self.stem(x)))
        x = x + self.act(self.wide_norm(self.wide(x)))
        return self.head_norm(self.head(x.mean((2, 3))))


def pixels(n=3, side=17):
    return {"pixels": torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(7))}


def check_same(module, folded, inputs):
    before, after = module(inputs), folded(inputs)
    # float32 rounding of a few layers
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_a_residual_network_computes_the_same_after_folding():
    module = settle(Residual())
    folded, names, reasons = fold_batch_norm(module, pixels())
    assert set(names) == {"stem+stem_norm", "wide+wide_norm", "head+head_norm"}
    assert reasons == ()
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in folded.modules())
    check_same(module, folded, torch.randn(2, 3, 23, 23))


def test_folding_leaves_the_original_alone():
    module = settle(Residual())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    folded, _, _ = fold_batch_norm(module, pixels())
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert isinstance(module.stem_norm, nn.BatchNorm2d)
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_no_hook_is_left_behind_even_when_the_forward_fails():
    module = settle(Residual())
    folded, _, _ = fold_batch_norm(module, pixels())
    assert not any(one._forward_hooks for one in folded.modules())

    held = []

    def failing(copied, examples):
        held.append(copied)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fold_batch_norm(module, pixels(), failing)
    assert not any(one._forward_hooks for one in held[0].modules())


def test_the_folded_weight_is_that_of_plain_loops():
    torch.manual_seed(0)
    norm = settle(nn.BatchNorm2d(3, eps=1e-3))
    weight, bias = torch.randn(3, 2, 1, 2), torch.randn(3)
    found_weight, found_bias = folded_weight(weight, bias, norm)
    for row in range(3):
        sigma = (float(norm.running_var[row]) + 1e-3) ** 0.5
        gain = float(norm.weight[row]) / sigma
        for column in range(2):
            for at in range(2):
                wanted = float(weight[row, column, 0, at]) * gain
                assert float(found_weight[row, column, 0, at]) == pytest.approx(wanted, rel=1e-6)
        wanted = (float(bias[row]) - float(norm.running_mean[row])) * gain + float(norm.bias[row])
        assert float(found_bias[row]) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_a_fresh_module_takes_the_folded_state():
    module = settle(Residual())
    folded, names, _ = fold_batch_norm(module, pixels())
    fresh = fold_again(Residual().eval(), names)
    fresh.load_state_dict(folded.state_dict(), strict=True)
    inputs = torch.randn(2, 3, 11, 11)
    assert torch.equal(fresh(inputs), folded(inputs))


def test_a_name_that_does_not_belong_is_refused():
    with pytest.raises(ModelError, match=r"stem\+nothing"):
        fold_again(Residual(), ["stem+nothing"])
    with pytest.raises(ModelError, match="not a convolution and a batch norm"):
        fold_again(Residual(), ["stem+act"])


def test_a_module_in_training_mode_is_refused():
    with pytest.raises(ModelError, match="training mode"):
        fold_batch_norm(Residual(), pixels())


class Pair(nn.Module):
    def __init__(self, conv, norm):
        super().__init__()
        self.conv = conv
        self.norm = norm


class UsedTwice(Pair):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class CalledTwice(Pair):
    def forward(self, x):
        return self.norm(self.conv(self.norm(self.conv(x))))


class NormFirst(Pair):
    def forward(self, x):
        return self.conv(self.norm(x))


class Never(Pair):
    def forward(self, x):
        return self.conv(x)


class Undecided(Pair):
    def forward(self, x):
        if x.sum() > 0:
            return self.norm(self.conv(x))
        return self.conv(x)


class Standardised(nn.Conv2d):
    """Uses its weight in another way than multiplying by it."""

    def forward(self, x):
        weight = self.weight / self.weight.square().sum((1, 2, 3), keepdim=True).sqrt()
        return F.conv2d(x, weight, self.bias)


class Plain(Pair):
    def forward(self, x):
        return self.norm(self.conv(x))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (UsedTwice(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), "used elsewhere"),
        (CalledTwice(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), "called 2 times"),
        (NormFirst(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), "no convolution"),
        (Never(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), "not called"),
        (Undecided(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), "cannot be traced"),
        (Plain(Standardised(3, 3, 1), nn.BatchNorm2d(3)), "more with its weight"),
        (
            Plain(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
            "no running statistics",
        ),
        (Plain(nn.ConvTranspose2d(3, 3, 1), nn.BatchNorm2d(3)), "no convolution"),
    ],
)
def test_a_norm_that_cannot_be_folded_stays_with_a_reason(module, reason):
    module.eval().requires_grad_(requires_grad=False)
    if module.norm.track_running_stats:
        settle(module)
    folded, names, reasons = fold_batch_norm(module, pixels())
    assert names == ()
    assert len(reasons) == 1
    assert reasons[0].startswith("norm stays: ")
    assert reason in reasons[0]
    assert isinstance(folded.norm, nn.BatchNorm2d)
    inputs = pixels()["pixels"]
    assert torch.equal(folded(inputs), module(inputs))


def test_a_norm_over_another_dimension_than_the_linear_outputs_stays():
    module = settle(Plain(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    inputs = {"inputs": torch.randn(2, 4, 5)}
    _, names, reasons = fold_batch_norm(module, inputs)
    assert names == ()
    assert "another dimension" in reasons[0]


def test_a_shared_weight_is_not_folded():
    first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    second.weight = first.weight
    module = settle(nn.Sequential(first, nn.BatchNorm2d(3), second))
    folded, names, reasons = fold_batch_norm(module, pixels())
    assert names == ()
    assert "shared" in reasons[0]
    assert torch.equal(folded(pixels()["pixels"]), module(pixels()["pixels"]))


class Picky(nn.Module):
    """Cannot be traced itself; its block can."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.last = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.block(x)
        return self.last(y) if bool((y >= 0).all()) else y


def test_parts_of_a_module_that_cannot_be_traced_are_still_folded():
    module = settle(Picky())
    folded, names, reasons = fold_batch_norm(module, pixels())
    assert names == ("block.0+block.1",)
    assert reasons == ("last stays: the code around it cannot be traced (TraceError)",)
    check_same(module, folded, pixels()["pixels"])


def test_a_module_without_norms_is_not_copied():
    module = nn.Linear(3, 2).eval()
    folded, names, reasons = fold_batch_norm(module, {"inputs": torch.zeros(1, 3)})
    assert (names, reasons) == ((), ())
    assert folded is module


def test_efficientnet_lite_is_folded_whole():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    module = settle(package.EfficientNet.from_name("efficientnet-lite0", num_classes=7))
    for one in module.modules():
        if isinstance(one, nn.BatchNorm2d):
            # gains near 1 keep the signal alive through 49 layers
            one.weight.data.uniform_(0.8, 1.2)
            one.running_mean.mul_(0.1)
    n_norms = sum(isinstance(one, nn.BatchNorm2d) for one in module.modules())
    folded, names, reasons = fold_batch_norm(module, pixels(1, 64))
    assert reasons == ()
    assert len(names) == n_norms == 49
    check_same(module, folded, torch.randn(1, 3, 65, 65))
