"""On which parts of its input a prediction rests, and on which units: signed, per prediction.

Integrated gradients of f, the one number that a prediction is explained for (`Asked`):

    eᵢ = (xᵢ − x'ᵢ) ∫₀¹ ∂f(x' + t(x − x')) / ∂xᵢ dt,        and the eᵢ sum to f(x) − f(x')

so nothing is counted twice or left out. x' is the baseline, an input that says nothing. Numbers
(pictures, tables, sound) are followed themselves; of tokens the vectors are followed that the
embedding gives for them, from zero, and the parts of each vector are summed to one number a token.

On the path of a language model its first token can stay as it is: attention rests on it (Xiao et
al. 2023, Efficient streaming language models with attention sinks, https://arxiv.org/abs/2309.17453),
and while its vector grows from zero that sets in with a jump, which no few steps follow.

Source: Sundararajan, Taly and Yan 2017, Axiomatic attribution for deep networks,
https://arxiv.org/abs/1703.01365, eq. 1 and proposition 1 (completeness). The integral is by the
midpoint rule; they sum at the right end of each step (eq. 3).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attar.errors import DataError
from attar.explain.sampling import tracked
from attar.records import Batch, Task
from attar.sites import Call, substituted, watched

# Points of the path that are run at once: what waits for the way back of a picture of 224 by 224
# takes about 100 MB a point.
POINTS_AT_ONCE = 4
# Names that a model's input goes by, in the order in which they are looked for.
INPUTS = ("inputs", "pixels", "features", "tokens")


@dataclass(frozen=True)
class Explained:
    """A model whose predictions are explained.

    Attributes:
        name: For people.
        weights: What stands in for its own weights, as in `sites.substituted`.
    """

    name: str
    task: Task
    module: nn.Module
    weights: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """The path that explanations follow.

    Attributes:
        baseline: x', in the shape of the input without the sample; None: zeros. Of numbers only.
        kept: First tokens that are in x' what they are in x.
        steps: Of the sum that stands for the integral.
    """

    baseline: Tensor | None = None
    kept: int = 0
    steps: int = 16


@dataclass(frozen=True)
class Asked:
    """The one number that a prediction is explained for; the same question for every model.

    Attributes:
        position: Of the prediction among those of its sample.
        answer: Class or token whose log-probability it is; -1 for outputs that are means.
        direction: Of such outputs, what they are projected on, `width`; None for the others.
    """

    position: int
    answer: int
    direction: Tensor | None = None

    def of(self, outputs: Tensor) -> Tensor:
        """Read it off outputs, `samples predictions width`; a number for each sample."""
        own = outputs[:, self.position]
        if self.direction is not None:
            return own @ self.direction
        return own.log_softmax(-1)[:, self.answer]


def explained_input(batch: Batch) -> str:
    """Name the tensor of a batch that explanations are about."""
    return next(name for name in INPUTS if name in batch)


def integrated_gradients(
    model: Explained,
    sample: Batch,
    asked: Asked,
    way: Way,
) -> Tensor:
    """Explain one prediction of one sample.

    Args:
        sample: A batch of one.

    Returns:
        In the shape of the input without the sample; of tokens, `tokens`.

    Raises:
        DataError: No gradient of the answer reaches the input.
    """
    total = torch.zeros(())
    middles = (torch.arange(way.steps) + 0.5) / way.steps
    for points in torch.split(middles, POINTS_AT_ONCE):
        answers, leaf, whole = _along(model, sample, asked, way, points)
        slopes = (whole * _gradient(model, answers.sum(), leaf)).sum(0)
        total = total + slopes / way.steps
    return total if sample[explained_input(sample)].is_floating_point() else total.sum(-1)


def whole_change(model: Explained, sample: Batch, asked: Asked, way: Way) -> float:
    """f(x) − f(x'), which the parts should sum to."""
    answers, _, _ = _along(model, sample, asked, way, torch.tensor([0.0, 1.0]))
    start, end = answers.detach().double()
    return float(end - start)


def _along(
    model: Explained, sample: Batch, asked: Asked, way: Way, points: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the model at points of the path.

    Returns:
        answers: f at each point.
        leaf: What to take its gradient by, `points ...`.
        whole: x − x', `1 ...`.
    """
    name = explained_input(sample)
    batch = {key: t.expand(len(points), *t.shape[1:]) for key, t in sample.items()}
    x = sample[name]
    if not x.is_floating_point():
        return _along_embedding(model, batch, asked, way.kept, points)
    start = torch.zeros_like(x) if way.baseline is None else way.baseline.to(x).expand_as(x)
    leaf = _between(start, x, points)
    # A copy goes in: a model may change its input in place, which a leaf does not allow.
    with torch.enable_grad(), substituted(model.module, model.weights):
        outputs = model.task.forward(model.module, {**batch, name: leaf.clone()})
        return asked.of(outputs), leaf, x - start


def _along_embedding(
    model: Explained, batch: Batch, asked: Asked, kept: int, points: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for the vectors that tokens are looked up as."""
    met: list[tuple[Tensor, Tensor]] = []
    tokens = batch[explained_input(batch)]

    def visit(call: Call) -> Tensor:
        output = call.run()
        if met or call.operation != "embedding" or not _same(call.input, tokens):
            return output
        end = output.detach()[:1]
        start = torch.zeros_like(end)
        start[:, :kept] = end[:, :kept]
        leaf = _between(start, end, points)
        met.append((leaf, end - start))
        return leaf.clone()

    # The inner of the two is asked first, while the weight is still the model's own.
    with (
        torch.enable_grad(),
        substituted(model.module, model.weights),
        watched(model.module, visit),
    ):
        answers = asked.of(model.task.forward(model.module, batch))
    if not met:
        raise _no_gradient(model)
    return answers, *met[0]


def _between(start: Tensor, end: Tensor, points: Tensor) -> Tensor:
    """Points of the straight path between two batches of one."""
    at = points.to(end.dtype).reshape(-1, *[1] * (end.dim() - 1))
    return (start + at * (end - start)).detach().requires_grad_()


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def _gradient(model: Explained, found: Tensor, leaf: Tensor) -> Tensor:
    if not found.requires_grad:
        raise _no_gradient(model)
    (gradient,) = torch.autograd.grad(found, leaf, allow_unused=True)
    if gradient is None:
        raise _no_gradient(model)
    return gradient


def _no_gradient(model: Explained) -> DataError:
    return DataError(
        f"no gradient of an answer of {model.name} reaches its input.",
        hint="leave --drift out; it follows gradients through the whole model.",
    )


def unit_relevance(
    model: Explained, sample: Batch, asked: Asked, units: Collection[str]
) -> dict[str, float]:
    """Sum |output × gradient| over the outputs of each unit, for one prediction of one sample.

    The gradient is that of the number asked for, at the sample itself. The criterion `taylor` takes
    the same product, of the gradients of sampled answers, by channel.
    """
    sums: dict[str, float] = defaultdict(float)

    def visit(call: Call) -> Tensor:
        unit, output = call.name.removesuffix(".weight"), call.run()
        if unit not in units:
            return output
        if not output.requires_grad:
            output = tracked(output)
        kept = output.detach().clone()  # the model may go on to change it in place

        def meet(gradient: Tensor) -> None:
            sums[unit] += float((kept * gradient).abs().double().sum())

        output.register_hook(meet)  # type: ignore[no-untyped-call]
        return output

    with (
        torch.enable_grad(),
        substituted(model.module, model.weights),
        watched(model.module, visit),
    ):
        asked.of(model.task.forward(model.module, sample)).sum().backward()  # type: ignore[no-untyped-call]
    return dict(sums)
