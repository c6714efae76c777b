"""How a converted file reads pictures that does not say so: as told, or as another model does.

A graph of another tool has a shape and no more: not what its numbers are scaled around. The side is
taken from the shape, and so is whether channels come first or last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import ModelError, SettingError
from attar.records import Architecture, Model

# Mean and deviation of each channel, where black is 0 and white is 1.
KNOWN = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # -1 to 1
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # 0 to 1
    "bytes": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),  # 0 to 255
}
HINT = (
    f"say it with --pictures: one of {', '.join(KNOWN)}; or give the tensors themselves, with "
    "--data FILE.npz"
)


@dataclass(frozen=True)
class Shape:
    """Of a graph's one input: its side, None where it is left open, and where channels are."""

    side: int | None
    channels_last: bool


class ChannelsLast(nn.Module):
    """Reads pictures with channels first and gives them to a graph that wants them last."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, pixels: Tensor) -> Tensor:
        """Answer to `samples 3 side side`."""
        answers: Tensor = self.graph(pixels.permute(0, 2, 3, 1))
        return answers


def shape_of(model: Model) -> Shape | None:
    """What pictures a graph reads; None where it is no graph, or reads something else."""
    inputs = getattr(model.module, "inputs", None)
    if model.task.name != "classify" or not isinstance(inputs, Mapping) or len(inputs) != 1:
        return None
    ((sides, kind),) = inputs.values()
    if kind != "tensor(float)" or len(sides) != 4 or 3 not in (sides[1], sides[3]):
        return None
    channels_last = sides[1] != 3
    height, width = sides[1:3] if channels_last else sides[2:]
    if isinstance(height, int) and isinstance(width, int):
        return Shape(height, channels_last) if height == width else None
    return Shape(None, channels_last)


def check_told(told: str) -> None:
    """Refuse what says nothing of pictures, before a model is loaded.

    Raises:
        SettingError: Neither a known way nor a side after it.
    """
    way, _, side = told.partition("@")
    if told and (way not in KNOWN or ("@" in told and not (side.isdecimal() and int(side) > 0))):
        raise SettingError(
            f"--pictures {told} is not known.",
            hint=f"type one of {', '.join(KNOWN)}, and where the file leaves its side open that "
            "too, such as imagenet@224",
        )


def with_pictures(model: Model, told: str, lent: Mapping[str, Any] | None = None) -> Model:
    """Let a graph read pictures as it was said, or else as the model does that it is compared with.

    Args:
        told: From `check_told`; "" for nothing.
        lent: Settings of the other model.

    Raises:
        ModelError: The side is left open by the graph, and nobody said it.
    """
    shape, config = shape_of(model), model.architecture.config
    if shape is None or "picture" in config or not (told or lent):
        return model
    way, _, side = told.partition("@")
    if told:
        mean, std = KNOWN[way]
        size = shape.side or int(side or 0) or (lent or {}).get("size", 0)
        picture = {"mean": mean, "std": std}
    else:
        size = shape.side or (lent or {}).get("size", 0)
        picture = dict(lent or {})
    if not size:
        raise ModelError(
            f"{model.name} reads pictures of any side.", hint=f"say it: --pictures {way}@224"
        )
    return replace(
        model,
        module=ChannelsLast(model.module).eval() if shape.channels_last else model.module,
        architecture=Architecture("onnx", {**config, "picture": picture | {"size": size}}),
        examples={"pixels": torch.zeros(2, 3, size, size)},
    )
