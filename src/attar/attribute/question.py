"""One number that a model answers, as a function of what it was given.

Explanations follow a point, the input, from a baseline, an input that says nothing. Numbers
(pictures, tables, sound) are followed themselves; of tokens the vectors are followed that the
embedding gives for them, from zero.

On the path of a language model its first token can stay as it is: attention rests on it (Xiao et
al. 2023, Efficient streaming language models with attention sinks, https://arxiv.org/abs/2309.17453),
and while its vector grows from zero that sets in with a jump, which no few steps follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attar.attribute.features import number_places
from attar.errors import DataError
from attar.records import Batch, Task
from attar.sites import Call, Visit, substituted, watched

# Points that are run at once: what waits for the way back of a picture of 224 by 224 takes about
# 100 MB a point, and without a way back little.
POINTS_AT_ONCE, ANSWERS_AT_ONCE = 4, 16
# Of the path of a text, which bends more than that of a picture.
TEXT_STEPS = 32
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
        steps: Of the sum that stands for an integral.
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


class Question:
    """f, the number asked for, at any point between the baseline and the input.

    Attributes:
        point: x, `1 ...`; of tokens `1 tokens width`.
        baseline: x', the same shape.
    """

    def __init__(
        self, model: Explained, sample: Batch, asked: Asked, way: Way, seed: int = 0
    ) -> None:
        """Look up what is followed.

        Args:
            sample: A batch of one.
            seed: Of every draw that a method makes.

        Raises:
            DataError: The tokens are looked up in no embedding of the model.
        """
        self.model, self.sample, self.asked, self.way = model, sample, asked, way
        self.seed = seed
        self._name = explained_input(sample)
        x = sample[self._name]
        self.of_tokens = not x.is_floating_point()
        self.point = self._vectors() if self.of_tokens else x
        self.baseline = torch.zeros_like(self.point)
        if self.of_tokens:
            self.baseline[:, : way.kept] = self.point[:, : way.kept]
        elif way.baseline is not None:
            self.baseline = way.baseline.to(x).expand_as(x)

    @cached_property
    def features(self) -> Int[Tensor, "..."]:
        """Number of each place's feature, in the shape of the map; -1: a place that stays."""
        shape = self.to_map(self.point).shape[1:]
        return number_places(shape, self.way.kept if self.of_tokens else 0)

    @property
    def n_features(self) -> int:
        """How many features there are."""
        return int(self.features.max()) + 1

    def draws(self) -> torch.Generator:
        """Begin the draws of a method."""
        return torch.Generator().manual_seed(self.seed)

    @property
    def change(self) -> Tensor:
        """x − x', `1 ...`."""
        return self.point - self.baseline

    def between(self, at: Float[Tensor, " points"]) -> Tensor:
        """Points of the straight path, 0 the baseline and 1 the input, `points ...`."""
        own = at.to(self.point.dtype).reshape(-1, *[1] * (self.point.dim() - 1))
        return self.baseline + own * self.change

    def answers(self, points: Tensor) -> Float[Tensor, " points"]:
        """f at points, `points ...`."""
        with torch.no_grad():
            parts = torch.split(points, ANSWERS_AT_ONCE)
            return torch.cat([self.run(part) for part in parts]).double()

    def slopes(self, points: Tensor) -> Tensor:
        """∂f/∂x at points, in their shape.

        Raises:
            DataError: No gradient of the answer reaches the input.
        """
        found = []
        for part in torch.split(points, POINTS_AT_ONCE):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                answers = self.run(leaf)
            if not answers.requires_grad:
                raise self._no_gradient()
            (gradient,) = torch.autograd.grad(answers.sum(), leaf, allow_unused=True)
            if gradient is None:
                raise self._no_gradient()
            found.append(gradient)
        return torch.cat(found)

    def whole_change(self) -> float:
        """f(x) − f(x'), which parts that are complete sum to."""
        start, end = self.answers(torch.cat([self.baseline, self.point]))
        return float(end - start)

    def to_map(self, values: Tensor) -> Tensor:
        """Sum what belongs to one place: channels of a pixel, parts of a token's vector.

        Args:
            values: In the shape of points.
        """
        dimension = self._summed
        return values if dimension is None else values.sum(dimension)

    def present(self, there: Bool[Tensor, "points features"]) -> Tensor:
        """Make points that are x where a feature is there, and x' where it is not."""
        always = torch.ones(len(there), 1, dtype=torch.bool)
        places = torch.cat([there, always], 1)[:, self.features.flatten()]
        places = places.reshape(len(there), *self.features.shape)
        if self._summed is not None:
            places = places.unsqueeze(self._summed)
        return torch.where(places, self.point, self.baseline)

    @property
    def _summed(self) -> int | None:
        if self.of_tokens:
            return -1
        return 1 if self.point.dim() == 4 else None

    def run(self, points: Tensor, visit: Visit | None = None) -> Float[Tensor, " points"]:
        """f at points of numbers or vectors, with its graph where there is one to keep.

        Args:
            visit: Sees the calls that read a weight, as in `sites.watched`; not of tokens.
        """
        batch = {key: t.expand(len(points), *t.shape[1:]) for key, t in self.sample.items()}
        model, asked = self.model, self.asked
        # A copy goes in: a model may change its input in place, which a leaf does not allow.
        if not self.of_tokens:
            batch[self._name] = points.clone()
            # The inner of the two is asked first, while the weight is still the model's own.
            with substituted(model.module, model.weights), watched(model.module, visit or _plainly):
                return asked.of(model.task.forward(model.module, batch))
        return asked.of(self._forward(batch, lambda _: points.clone()))

    def _vectors(self) -> Tensor:
        """What the tokens are looked up as."""
        met: list[Tensor] = []

        def keep(call: Call) -> Tensor:
            met.append(call.run().detach())
            return met[0]

        with torch.no_grad():
            self._forward(self.sample, keep)
        return met[0]

    def _forward(self, batch: Batch, instead: Callable[[Call], Tensor]) -> Tensor:
        """Run with something instead of what the tokens are first looked up as."""
        tokens, met = batch[self._name], list[str]()
        module, weights = self.model.module, self.model.weights

        def visit(call: Call) -> Tensor:
            if met or call.operation != "embedding" or not _same(call.input, tokens):
                return call.run()
            met.append(call.name)
            return instead(call)

        with substituted(module, weights), watched(module, visit):
            outputs = self.model.task.forward(module, batch)
        if not met:
            raise self._no_gradient()
        return outputs

    def _no_gradient(self) -> DataError:
        return DataError(
            f"no gradient of an answer of {self.model.name} reaches its input.",
            hint="explain by a method that only asks for answers (occlusion, shapley_sampling), "
            "or leave --drift out.",
        )


def _plainly(call: Call) -> Tensor:
    return call.run()


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())
