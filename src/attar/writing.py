"""What goes into the written folder, and how many bytes of it are not units' tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attar.errors import PlanError, SettingError
from attar.export import attar_folder, gguf_model, onnx_model
from attar.export.onnx_factors import Factored
from attar.export.onnx_graph import FloatGraph, float_graph, forget
from attar.export.onnx_graph import readers as readers_of
from attar.export.onnx_nodes import Codes, Stored
from attar.load.folder import VERSION
from attar.load.narrow import changed_sizes
from attar.transform import groups
from attar.transform.apply import biases
from attar.transform.factorize_low_rank import FactorizeLowRank
from attar.transform.keep_float import KeepFloat
from attar.transform.llama_blocks import TYPES
from attar.transform.quantize_feedback import QuantizeFeedback
from attar.transform.quantize_llama import QuantizeLlama
from attar.transform.quantize_rtn import QuantizeRtn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from attar.decide import Decided
    from attar.export.pieces import Content
    from attar.records import Candidate, Recipe
    from attar.session import Session
    from attar.transform.apply import Treated

# In attar.json and in the header of model.safetensors, for one unit, before any plan is known.
BYTES_PER_UNIT = 520
BYTES_PER_LEFTOVER = 120
# Of one tensor's place in a GGUF file, with what it is rounded up to.
BYTES_PER_TENSOR = 90
# Of one unit's nodes in an ONNX file.
BYTES_PER_NODES = 700


# What an option that names a way may be.
CHOICES: Mapping[str, Sequence[str]] = {
    "to": ("attar", "gguf", "onnx"),
    "equalise": ("none", "auto", "learned"),
    "activations": ("none", "static", "dynamic"),
    "biases": ("kept", "moved"),
    "cut": ("off", "auto", "only"),
}


def check_form(recipe: Recipe) -> None:
    """Refuse a way that there is not.

    Raises:
        SettingError: With those that there are.
    """
    for option, ways in CHOICES.items():
        if (typed := getattr(recipe, option)) not in ways:
            raise SettingError(
                f"--{option} cannot be {typed!r}.",
                hint=f"use --{option} {f' or --{option} '.join(ways)}.",
            )
    if recipe.activations != "none" and recipe.to != "onnx":
        raise SettingError(
            f"activations in 8 bits gain nothing in the form {recipe.to!r}, which runs in floats.",
            hint="add --to onnx, or leave --activations out.",
        )
    _check_cut(recipe)


def _check_cut(recipe: Recipe) -> None:
    """Refuse what a cut does not go with."""
    if recipe.cut == "off":
        return
    if recipe.to == "gguf":
        raise SettingError(
            "--cut leaves layers of different widths, which the files of llama.cpp do not hold.",
            hint="leave --to gguf out, or --cut.",
        )
    if recipe.decide != "price":
        raise SettingError(
            f"--cut compares prices, and --decide {recipe.decide} has none.",
            hint="leave --decide out, or --cut.",
        )


def check_all_sizes(recipe: Recipe) -> None:
    """Refuse what depends on a size where there is none.

    Raises:
        SettingError: What is cut depends on what a byte is worth, which differs from size to size.
    """
    if recipe.cut != "off":
        raise SettingError(
            "what --cut leaves depends on the size, so one pricing does not do for all.",
            hint="leave --cut or --frontier out.",
        )


def check_model(session: Session) -> None:
    """Refuse a form, or a model that it cannot hold, before long work.

    Raises:
        AttarError: With the reason.
    """
    check_form(session.recipe)
    if session.recipe.equalise != "none" and session.on_disk:
        raise SettingError(
            f"the weights of {session.model.name} stay on disk, where they cannot be equalised.",
            hint="leave --equalise out.",
        )
    if session.recipe.cut != "off" and session.on_disk:
        raise SettingError(
            f"the weights of {session.model.name} stay on disk, where nothing can be cut.",
            hint="leave --cut out.",
        )
    if session.recipe.to == "gguf":
        model = session.model
        gguf_model.check_model(model.architecture.config, model.files, model.name)
    if session.recipe.to == "onnx":
        onnx_model.check_model(session.model.task.name, session.model.name)
        if session.recipe.equalise == "none":  # or else the weights will be others by then
            _graph(session)


def contents(session: Session, decided: Decided) -> Mapping[str, Content]:
    """Make every file of the folder; what is large is made as it is written."""
    if session.recipe.to == "gguf":
        units = {f"{name}.weight": _stored(one) for name, one in decided.treated.items()}
        return _gguf(session, units, biases(decided.treated))
    if session.recipe.to == "onnx":
        stored = {
            name: _for_onnx(one, decided.plan.choices[name])
            for name, one in decided.treated.items()
        }
        return _onnx(session, stored, biases(decided.treated))
    tensors = {
        f"{name}/{part}": tensor
        for name, treated in decided.treated.items()
        for part, tensor in treated.tensors.items()
    }
    tensors.update(session.leftovers(biases(decided.treated)))
    return attar_folder.file_contents(tensors, _description(session, decided), session.model.files)


def _gguf(
    session: Session, units: Mapping[str, gguf_model.Stored], moved: Mapping[str, Tensor]
) -> dict[str, Content]:
    model, state = session.model, session.model.module.state_dict() | dict(moved)
    # llama.cpp computes with norms in float32, and they weigh little.
    kept = {left.name: gguf_model.Stored(state[left.name]) for left in session.units.leftovers}
    return gguf_model.file_contents(
        {**units, **kept}, model.architecture.config, model.files, model.name, model.licence
    )


def _stored(treated: Treated) -> gguf_model.Stored:
    transform = treated.transform
    if isinstance(transform, QuantizeLlama):
        return gguf_model.Stored(treated.tensors["blocks"], TYPES[transform.type].number)
    if isinstance(transform, KeepFloat):
        return gguf_model.Stored(treated.tensors["weight"])
    raise PlanError(
        f"{treated.unit.name} has a treatment that llama.cpp does not know.",
        hint="give it quantize_llama or keep_float in the plan, or leave --to out.",
    )


def _graph(session: Session) -> FloatGraph:
    model = session.model
    return float_graph(model.module, model.examples, session.units, model.task.name)


def weights_changed(session: Session) -> None:
    """Keep nothing that was made from the weights of a session's module as they were."""
    forget(session.model.module)


def readers(session: Session) -> dict[str, frozenset[str] | None]:
    """Units that read what each convolution makes; None where others read it too."""
    return readers_of(_graph(session))


def is_int8(choice: Candidate) -> bool:
    """Say whether a treatment makes what engines multiply as integers: 8 bits, a scale per row."""
    kinds = ("quantize_feedback", "quantize_rtn")
    settings = choice.settings
    shape = (settings.get("bits"), settings.get("group_size"), settings.get("symmetric"))
    return choice.treatment in kinds and shape == (8, 0, True)


def _onnx(
    session: Session, units: Mapping[str, Stored | Factored], moved: Mapping[str, Tensor]
) -> dict[str, bytes]:
    about = _about_model(session)
    known = ("model", "origin", "licence", "task", "config")
    described = {key: about[key] for key in known} | {"inputs": list(session.model.examples)}
    files = session.model.files
    return onnx_model.file_contents(_graph(session), units, files, described, moved)


def _for_onnx(treated: Treated, choice: Candidate) -> Stored | Factored:
    unit, transform = treated.unit, treated.transform
    rounds = choice.input is not None or choice.output is not None
    if rounds and not (is_int8(choice) and "embedding" not in unit.uses):
        raise PlanError(
            f"{unit.name} has activations in 8 bits and weights that do not go with them.",
            hint="give it quantize_feedback with bits 8, group_size 0 and symmetric true, or take "
            "input and output out of its line.",
        )
    if choice.input is not None and choice.input.by_row and len(unit.shape) != 2:
        raise PlanError(
            f"{unit.name} is a convolution, and what it reads has no rows.",
            hint="write input: {dynamic: true} in its line.",
        )
    if isinstance(transform, KeepFloat) and not transform.bfloat16:
        return Stored(unit, treated.tensors["weight"])
    if isinstance(transform, FactorizeLowRank) and transform.bits == KeepFloat.bits:
        names = ("left_weight", "middle", "right_weight")
        return Factored(unit, *(treated.tensors[name] for name in names))
    if isinstance(transform, QuantizeFeedback | QuantizeRtn) and transform.bits in (4, 8):
        bits, symmetric = transform.bits, transform.symmetric
        size = (unit.rows, unit.columns, transform.group_size)
        codes, scale, zero_point = groups.load_stored(treated.tensors, bits, *size, symmetric)
        weight = Codes(codes, scale, zero_point, bits, symmetric)
        return Stored(unit, weight, choice.input, choice.output)
    raise PlanError(
        f"{unit.name} has a treatment that ONNX has no operators for.",
        hint="give it quantize_feedback with 4 or 8 bits, factorize_low_rank with 16, or "
        "keep_float, or leave --to out.",
    )


def overhead_bytes(session: Session, decided: Decided) -> int:
    """Weigh everything in the folder that is not a unit's tensors."""
    stored = sum(t.nbytes for one in decided.treated.values() for t in one.tensors.values())
    return attar_folder.weigh(contents(session, decided)) - stored


def estimated_overhead(session: Session) -> int:
    """Guess that weight before there is a plan; corrected as soon as there is one."""
    if session.recipe.to == "gguf":
        return attar_folder.weigh(_gguf(session, {}, {})) + BYTES_PER_TENSOR * len(
            session.units.units
        )
    if session.recipe.to == "onnx":
        weighed = attar_folder.weigh(_onnx(session, {}, {}))
        return weighed + BYTES_PER_NODES * len(session.units.units)
    kept = sum(tensor.nbytes for tensor in session.leftovers().values())
    files = attar_folder.weigh(attar_folder.file_contents({}, {}, session.model.files))
    described = len(json.dumps(_about_model(session)))
    per_unit = BYTES_PER_UNIT * len(session.units.units)
    return kept + files + described + per_unit + BYTES_PER_LEFTOVER * len(session.units.leftovers)


def _about_model(session: Session) -> dict[str, Any]:
    model = session.model
    cut = {"cut": {"sizes": sizes_of(session)}} if session.cuts else {}
    return {
        "attar": VERSION,
        "model": model.name,
        "origin": model.origin,
        "licence": model.licence,
        "source_bytes": model.source_bytes,
        "task": model.task.name,
        "builder": model.architecture.builder,
        "config": dict(model.architecture.config),
        "folded": list(session.folded),
        "examples": {
            name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
            for name, t in model.examples.items()
        },
        **cut,
        "provenance": session.provenance(),
    }


def sizes_of(session: Session) -> dict[str, dict[str, int]]:
    """Numbers of channels, heads and so on that parts of a model that was cut know otherwise."""
    return changed_sizes(session.original.module, session.model.module)


def _description(session: Session, decided: Decided) -> dict[str, Any]:
    """Plan and receipt in one: what each unit's tensors are, and what they should cost."""
    units = {}
    for applied in decided.receipt.applied:
        unit = session.units.named(applied.unit)
        units[applied.unit] = {
            "treatment": applied.treatment,
            **applied.settings,
            "shape": list(unit.shape),
            "nats": float(f"{applied.predicted_damage:.3e}"),
        }
    return {
        **_about_model(session),
        "weight_bytes": decided.plan.budget.weight_bytes,
        "keep": list(decided.plan.budget.keep),
        "units": units,
    }
