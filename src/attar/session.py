"""One model with its data, units and settings: what every stage of the main path is given."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attar import cost
from attar.divergence import Divergence, fit_gaussian
from attar.errors import AttarError, ModelError
from attar.explain import price
from attar.explain.probe import Changes, Probed, probe
from attar.explain.statistics import gather_statistics
from attar.load.data import DataSizes, load_data
from attar.load.fold import fold_batch_norm
from attar.load.folder import is_attar_folder, load_folder, read_folder
from attar.load.model import is_factory, load_model
from attar.load.units import list_units
from attar.memory import release, use_little
from attar.parallel import in_order, one_thread
from attar.plan.size import parse_size
from attar.records import (
    Batch,
    Data,
    Model,
    Progress,
    Recipe,
    Replacement,
    Silent,
    Statistics,
    Transform,
    Unit,
    Units,
)
from attar.transform.apply import Treated, build_transform, check_finite, substitutions, treat

# A prediction of a language model is one of thousands; one of a classifier is one of few, so more
# answers are drawn for each to see as many gradients.
DRAWS = {"classify": 4, "regress": 4, "embed": 4, "transcribe": 2}
# Width of the rounding error on which coherence is measured: one that the plan often makes.
REFERENCE_BITS = 4
# Share of the calibration data it is measured on where every position has its prediction.
REFERENCE_SHARE_OF_SEQUENCES = 0.25
# Treatments whose errors cancel over what they were fitted to.
FEEDS_BACK = ("quantize_feedback", "quantize_entropy")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Session:
    """What the main path works on. Made once by `open_session`.

    Attributes:
        folded: Norms folded into the layer before them, for rebuilding the module.
        seconds: Stage to seconds so far; the one thing here that grows.
    """

    recipe: Recipe
    model: Model
    units: Units
    data: Data
    divergence: Divergence
    folded: tuple[str, ...]
    notes: tuple[str, ...]
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of a block to a stage."""
        release()
        start = time.perf_counter()
        yield
        release()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    @property
    def n_parameters(self) -> int:
        """Numbers the model holds, units and leftovers."""
        held = sum(unit.n_weights for unit in self.units)
        return held + sum(torch.Size(left.shape).numel() for left in self.units.leftovers)

    @property
    def bytes_at_16_bits(self) -> int:
        """What the model weighs with every number in 16 bits."""
        return cost.fp16_bytes(self.units, self.units.leftovers)

    def budget_bytes(self) -> int:
        """The recipe's size in bytes."""
        return parse_size(
            self.recipe.size, bytes_at_16_bits=self.bytes_at_16_bits, n_parameters=self.n_parameters
        )

    def weight(self, unit: Unit) -> Tensor:
        """A unit's weight, `rows columns`."""
        parameter = self.model.module.get_parameter(unit.name + ".weight")
        return parameter.detach().reshape(unit.rows, unit.columns)

    def for_each_unit(self, work: Callable[[Unit], Result]) -> Iterator[Result]:
        """Do work on every unit, in order, on all cores."""
        for done in in_order(work, self.units):
            release()
            yield done

    def gather(self) -> Statistics:
        """Gather A and G of the original on calibration data."""
        return gather_statistics(
            self.model,
            self.units,
            self.data.calibration,
            self.divergence,
            seed=self.recipe.seed,
            slices=self.data.slices,
            draws=self.draws,
            progress=self.progress,
        )

    @property
    def draws(self) -> int:
        """Answers sampled for each prediction."""
        return DRAWS.get(self.model.task.name, 1)

    @property
    def predicts_everywhere(self) -> bool:
        """Say whether every position has a prediction of its own, as in a language model.

        Then what reaches one prediction comes mostly from one position, and taking positions as
        independent is right; a picture or a sentence has one prediction for all its positions.
        """
        return self.model.task.name == "language"

    def price(self, unit: Unit, change: Tensor, statistics: Statistics, treatment: str) -> float:
        """Nats per prediction of a change that a treatment made of a weight, `rows columns`."""
        alone = price.damage(change, statistics.curvatures[unit.name])
        return alone * _coherence(statistics, treatment, unit)

    def price_all(
        self, unit: Unit, treatments: Sequence[tuple[str, Transform]], statistics: Statistics
    ) -> Iterator[float | AttarError]:
        """Price each treatment of a unit, rounded on one half of the statistics, on the other.

        Of a large weight some rows stand for all.
        """
        weight, curvatures = self.weight(unit), statistics.curvatures[unit.name]
        check_finite(unit, weight)
        moment = price.rounding_moment(curvatures, held_out=True)
        sample = price.sample_rows(weight, curvatures) if unit.groups == 1 else None
        rows = price.row_weights(curvatures, sample)
        if sample is not None:
            weight, curvatures = weight[sample.rows], price.of_rows(curvatures, sample)
        transforms = [transform for _, transform in treatments]
        results = treat(weight, moment, transforms, rows, for_price=True)
        for (treatment, _), made in zip(treatments, results, strict=True):
            if isinstance(made, AttarError):
                yield made
            else:
                alone = price.damage(made.dense - weight, curvatures, held_out=True)
                yield alone * _coherence(statistics, treatment, unit)

    def coherence(self, statistics: Statistics) -> dict[str, dict[str, float]]:
        """Measure how much more rounding errors do than A and G, taken as independent, say.

        Where one prediction has many positions, errors add up over them; error feedback makes
        errors that cancel over what it was fitted to, so it has its own factor. In a language model
        a few tokens with huge inputs and no gradient would fill A with what does not matter.
        """
        plain = build_transform("quantize_rtn", {"bits": REFERENCE_BITS, "group_size": 0})
        if self.predicts_everywhere:
            return {"": self._coherence(statistics, plain, REFERENCE_SHARE_OF_SEQUENCES)}
        fed_back = build_transform("quantize_feedback", {"bits": REFERENCE_BITS, "group_size": 0})
        return {
            "": self._coherence(statistics, plain, 1.0),
            "quantize_feedback": self._coherence(statistics, fed_back, 1.0),
        }

    def _coherence(
        self, statistics: Statistics, reference: Transform, share: float
    ) -> dict[str, float]:
        def make(unit: Unit) -> tuple[Treated, float] | None:
            made = next(self.treat(unit, [reference], statistics))
            if not isinstance(made, Replacement):
                return None
            change, curvatures = made.dense - self.weight(unit), statistics.curvatures[unit.name]
            return Treated(unit, reference, made.tensors, made.unpacked), price.damage(
                change, curvatures, held_out=True
            )

        made = [one for one in self.for_each_unit(make) if one is not None]
        changes = {one.unit.name: self._change(one) for one, _ in made}
        found = self._damages(self._probe(changes, share))
        ratios = {}
        for one, alone in made:
            # Part of the data may not reach every unit; what it does not reach is not free.
            there = found.get(one.unit.name, 0.0)
            ratios[one.unit.name] = there / alone if there > 0 and alone > 0 else 1.0
        return ratios

    def _change(self, treated: Treated) -> Callable[[], Tensor]:
        weight = self.model.module.get_parameter(f"{treated.unit.name}.weight").detach()
        return lambda: treated.weight().sub_(weight)

    def probe(self, treated: Mapping[str, Treated], share: float) -> dict[str, float]:
        """Price each unit's change where all changes have been made, in nats per prediction.

        Args:
            share: Of the calibration batches, taken from the front.
        """
        changes = {name: self._change(one) for name, one in treated.items()}
        return self._damages(self._probe(changes, share, substitutions(treated)))

    def _damages(self, found: Mapping[str, Probed]) -> dict[str, float]:
        return {
            name: one.independent if self.predicts_everywhere else one.coherent
            for name, one in found.items()
        }

    def _probe(
        self, changes: Changes, share: float, weights: Changes | None = None
    ) -> dict[str, Probed]:
        n = max(1, round(len(self.data.calibration) * share))
        return probe(
            self.model,
            changes,
            self.data.calibration[:n],
            self.divergence,
            seed=self.recipe.seed,
            draws=self.draws,
            progress=self.progress,
            weights=weights,
        )

    def treat(
        self, unit: Unit, transforms: Sequence[Transform], statistics: Statistics
    ) -> Iterator[Replacement | AttarError]:
        """Try treatments on a unit's weight, rounded on the first half of the statistics."""
        weight = self.weight(unit)
        check_finite(unit, weight)
        curvatures = statistics.curvatures[unit.name]
        moment = price.rounding_moment(curvatures, held_out=True)
        return treat(weight, moment, transforms, price.row_weights(curvatures))

    def leftovers(self) -> dict[str, Tensor]:
        """Tensors no plan decides about, in the format they are stored in."""
        state = self.model.module.state_dict()
        kept = {left.name: state[left.name] for left in self.units.leftovers}
        return {name: t.to(cost.leftover_dtype(name, t)).contiguous() for name, t in kept.items()}

    def provenance(self) -> dict[str, Any]:
        """What a reader needs to run this again."""
        packages = ("attar", "torch", "numpy", "scipy", "safetensors")
        return {
            "seed": self.recipe.seed,
            "data": self.data.origin,
            "original_sha256": state_hash(self.model.module),
            "versions": {name: version(name) for name in packages},
            "python": platform.python_version(),
            "machine": platform.machine(),
        }


def _coherence(statistics: Statistics, treatment: str, unit: Unit) -> float:
    kind = "quantize_feedback" if treatment in FEEDS_BACK else treatment
    by_unit = statistics.coherence.get(kind, statistics.coherence.get("", {}))
    return by_unit.get(unit.name, 1.0)


def state_hash(module: nn.Module) -> str:
    """sha256 over the names and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def open_model(recipe: Recipe, module: nn.Module | None = None, examples: Any = None) -> Model:
    """Load a model from wherever it is: a name, a folder, a file, code, or a module at hand."""
    if module is not None:
        return load_model(module, examples=examples, task=recipe.task)
    path = Path(recipe.model)
    if recipe.degrid is not None and (is_attar_folder(path) or is_factory(recipe.model)):
        raise ModelError(
            f"--degrid rescales language models, and {recipe.model} cannot be rescaled.",
            hint="leave --degrid out.",
        )
    if is_attar_folder(path):
        code = load_model(recipe.factory, task=recipe.task).module if recipe.factory else None
        return load_folder(read_folder(path, build_transform), code)
    if recipe.factory:
        raise ModelError(
            f"--factory goes with a folder that Attar wrote, and {recipe.model} is none.",
            hint=f"name the code as the model: attar compress {recipe.factory}",
        )
    return load_model(
        recipe.model,
        seed_degrid=recipe.degrid,
        accept_licence=recipe.accept_licence,
        task=recipe.task,
    )


def open_recipe(recipe: Recipe, progress: Progress | None = None) -> Session:
    """Load the model and its data."""
    shown = progress or Silent()
    with shown.stage(f"load {recipe.model}", 0):
        model = open_model(recipe)
    return open_session(recipe, model, shown)


def open_session(
    recipe: Recipe,
    model: Model,
    progress: Progress,
    arrays: Mapping[str, Any] | None = None,
) -> Session:
    """Fold what can be folded, find the units, and gather data.

    Args:
        arrays: Samples at hand, used in place of what `recipe.data` names.
    """
    start = time.perf_counter()
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    use_little()
    folded_module, folded, stays = fold_batch_norm(model.module, model.examples, model.task.forward)
    model = replace(model, module=folded_module.requires_grad_(False))
    units = list_units(model)
    sizes = DataSizes(recipe.calibration, recipe.recovery, recipe.audit)
    data = load_data(
        model,
        arrays or recipe.data,
        seed=recipe.seed,
        sizes=sizes,
        slices=recipe.slices,
        progress=progress,
    )
    notes = tuple(f"norm {line}" for line in stays)
    divergence = fit_divergence(model, data)
    release()
    session = Session(recipe, model, units, data, divergence, folded, notes, progress)
    session.seconds["load"] = time.perf_counter() - start
    return session


def fit_divergence(model: Model, data: Data) -> Divergence:
    """Pick the task's divergence; for means, fit the scale of the outputs on calibration data."""
    if model.task.family == "categorical":
        return Divergence("categorical")

    def answer(batch: Batch) -> Tensor:
        with torch.no_grad():
            return model.task.forward(model.module, batch).flatten(0, 1)

    outputs = torch.cat(list(in_order(answer, data.calibration)))
    with one_thread():
        return fit_gaussian(outputs)
