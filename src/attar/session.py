"""One model with its data, units and settings: what every stage of the main path is given."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attar import cost
from attar.disk import dense, lies_on_disk
from attar.divergence import Divergence, fit_gaussian
from attar.environment import version
from attar.errors import ModelError
from attar.explain.statistics import gather_statistics
from attar.gguf_names import FILE as GGUF_FILE
from attar.heal.wish import parse_wish
from attar.load.data import DataSizes, load_data
from attar.load.fold import fold_batch_norm
from attar.load.folder import is_attar_folder, load_folder, read_folder
from attar.load.model import is_factory, load_model
from attar.load.onnx_model import read_onnx
from attar.load.openvino_model import read_openvino
from attar.load.units import list_units
from attar.memory import release, use_little
from attar.onnx_names import FILE as ONNX_FILE
from attar.parallel import Work, in_order, one_thread
from attar.plan.size import parse_size
from attar.records import (
    Batch,
    Cut,
    Data,
    Equalised,
    Model,
    Progress,
    Recipe,
    Silent,
    Statistics,
    Unit,
    Units,
)
from attar.resuming import Finished, keeping, key_of
from attar.transform.apply import build_transform
from attar.workers import Workers, start

# Read beside the three splits where something is to be learned: tokens, or samples, at most.
MORE = {"language": 524_288, "classify": 512, "embed": 8_192}
# A prediction of a language model is one of thousands; one of a classifier is one of few, so more
# answers are drawn for each to see as many gradients.
DRAWS = {"classify": 4, "regress": 4, "embed": 4, "transcribe": 2}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Session:
    """What the main path works on. Made once by `open_session`.

    Attributes:
        folded: Norms folded into the layer before them, for rebuilding the module.
        equalised: Changes of channels that were folded into the module since.
        original_sha256: `state_hash` before those; empty where there were none.
        seconds: Stage to seconds so far; the one thing here that grows.
        workers: That were joined; None to work on threads of this process.
        finished: What need not be done again, because a run that was killed has done it.
        cuts: Coupled units that `model` and `units` are without.
        whole: The session before those were cut; None where nothing was.
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
    workers: Workers | None = None
    finished: Finished = field(default_factory=Finished)
    equalised: tuple[Equalised, ...] = ()
    original_sha256: str = ""
    cuts: tuple[Cut, ...] = ()
    whole: Session | None = None

    @property
    def before_cuts(self) -> Session:
        """The session of the model as it is before anything is cut: what all is held against."""
        return self.whole or self

    @property
    def original(self) -> Model:
        """The model that what is made is compared with."""
        return self.before_cuts.model

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
        """Numbers the original holds, units and leftovers."""
        units = self.before_cuts.units
        return cost.count_numbers(units, units.leftovers)

    @property
    def bytes_at_16_bits(self) -> int:
        """What the original weighs with every number in 16 bits."""
        units = self.before_cuts.units
        return cost.fp16_bytes(units, units.leftovers)

    def budget_bytes(self) -> int:
        """The recipe's size in bytes."""
        return parse_size(
            self.recipe.size, bytes_at_16_bits=self.bytes_at_16_bits, n_parameters=self.n_parameters
        )

    def weight(self, unit: Unit) -> Tensor:
        """A unit's weight, `rows columns`."""
        return self.parameter(unit.name + ".weight").reshape(unit.rows, unit.columns)

    def bias(self, unit: Unit) -> Tensor | None:
        """A unit's bias that can take its mean error away, `rows`."""
        return self.parameter(unit.bias) if unit.bias else None

    def parameter(self, name: str) -> Tensor:
        """A parameter of the model as it stands, in memory."""
        return dense(self.model.module.get_parameter(name))

    @cached_property
    def on_disk(self) -> bool:
        """Whether the weights lie on disk; then what else is large goes there too."""
        return lies_on_disk(self.model.module)

    def for_each_unit(
        self,
        work: Callable[[Unit], Work[Result]],
        units: Sequence[Unit] | None = None,
        step: Callable[[Unit], str] | None = None,
    ) -> Iterator[Result]:
        """Do a piece of work for each unit, in order, on all cores or by all workers.

        Args:
            work: Makes the piece of a unit.
            units: Which; None for all.
            step: Names what a piece makes, to keep it; None not to.
        """

        def do(unit: Unit) -> Result:
            if step is None:
                return self._do(work(unit), unit)
            return self.finished.once(step(unit), lambda: self._do(work(unit), unit))

        at_once = None if self.workers is None else self.workers.at_once
        for done in in_order(do, self.units.units if units is None else units, at_once):
            release()
            yield done

    def _do(self, work: Work[Result], unit: Unit) -> Result:
        if self.workers is None:
            return work()
        return self.workers.do(work, f"unit {unit.name}", self.tell)

    def tell(self, line: str) -> None:
        """Say a line where progress is shown."""
        with self.progress.stage(line, 0):
            pass

    @contextmanager
    def keeping(self, out: Path | None, more: Mapping[str, Any] | None = None) -> Iterator[Session]:
        """Keep what is finished beside `out`, and go on from what is kept there; see `resuming`.

        Args:
            more: What must be the same too, for a finished step to be of use.
        """
        if out is None:
            yield self
            return
        with keeping(out, self._key() | dict(more or {}), self.tell) as finished:
            yield replace(self, finished=finished)

    def _key(self) -> dict[str, Any]:
        """What must be the same for a finished step to be of use."""
        with one_thread(), torch.no_grad():
            answers = self.model.task.forward(self.model.module, self.model.examples)
        hashes = {
            "weights": state_hash(self.model.module),
            "code": tensors_hash([{"answers": answers}]),
            "data": tensors_hash([*self.data.calibration, *self.data.recovery]),
            "slices": [list(labels) for labels in self.data.slices],
        }
        return key_of(self.recipe, hashes)

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

    def leftovers(self, biases: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Tensors no plan decides about, in the format they are stored in.

        Args:
            biases: Those that took up a mean error, by name.
        """
        state = self.model.module.state_dict() | dict(biases or {})
        kept = {left.name: state[left.name] for left in self.units.leftovers}
        return {name: t.to(cost.leftover_dtype(name, t)).contiguous() for name, t in kept.items()}

    @cached_property
    def original_hash(self) -> str:
        """sha256 of the original; reads every weight, so once."""
        return state_hash(self.model.module)

    def provenance(self) -> dict[str, Any]:
        """What a reader needs to run this again."""
        packages = ("attar", "torch", "numpy", "scipy", "safetensors")
        return {
            "seed": self.recipe.seed,
            "data": self.data.origin,
            "original_sha256": self.original_sha256 or self.before_cuts.original_hash,
            "versions": {name: version(name) for name in packages},
            "python": platform.python_version(),
            "machine": platform.machine(),
        }


def tensors_hash(batches: Iterable[Batch]) -> str:
    """sha256 over the names and bytes of all tensors."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in batch.items():
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def state_hash(module: nn.Module) -> str:
    """sha256 over the names and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(name.encode())
        digest.update(dense(parameter).contiguous().view(-1).view(torch.uint8).numpy().data)
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
    if (path / GGUF_FILE).is_file() and not is_attar_folder(path):
        recipe = replace(recipe, model=str(path / GGUF_FILE))
    if (path / ONNX_FILE).is_file() and not is_attar_folder(path):
        return read_onnx(path / ONNX_FILE, recipe.task)
    if path.suffix == ".onnx" and path.is_file():
        return read_onnx(path, recipe.task)
    if path.suffix == ".xml" and path.is_file():
        return read_openvino(path, recipe.task)
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


def open_recipe(
    recipe: Recipe,
    progress: Progress | None = None,
    change: Callable[[Model], Model] | None = None,
) -> Session:
    """Load the model and its data.

    Args:
        change: What is done to the model before its data is made, where it is only compared: then
            a graph will do, which has no units.
    """
    shown = progress or Silent()
    start(recipe.workers)  # what cannot be reached is refused before a model is loaded
    use_little()
    with shown.stage(f"load {recipe.model}", 0):
        model = open_model(recipe)
        model = model if change is None else change(model)
    return open_session(recipe, model, shown, only_compared=change is not None)


def open_session(
    recipe: Recipe,
    model: Model,
    progress: Progress,
    arrays: Mapping[str, Any] | None = None,
    *,
    only_compared: bool = False,
) -> Session:
    """Fold what can be folded, find the units, and gather data.

    Args:
        arrays: Samples at hand, used in place of what `recipe.data` names.
        only_compared: Whether a graph of ONNX or OpenVINO will do, which has no units.
    """
    begin = time.perf_counter()
    workers = start(recipe.workers)
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    use_little(on_disk=lies_on_disk(model.module))
    folded_module, folded, stays = fold_batch_norm(model.module, model.examples, model.task.forward)
    model = replace(model, module=folded_module.requires_grad_(False))
    graph = only_compared and model.architecture.builder == "onnx"
    units = Units((), ()) if graph else list_units(model)
    units = units if recipe.biases == "moved" else units.without_biases()
    more = MORE.get(model.task.name, 0) if parse_wish(recipe.heal) is not None else 0
    sizes = DataSizes(recipe.calibration, recipe.recovery, recipe.audit, more=more)
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
    session = Session(
        recipe, model, units, data, divergence, folded, notes, progress, workers=workers
    )
    session.seconds["load"] = time.perf_counter() - begin
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
