"""Converted files of another tool are compared on pictures, told how they read them."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from attar.cli import main
from attar.load.onnx_model import read_onnx
from attar.load.picture_graphs import KNOWN, with_pictures

SIDE = 9
COUNTS = ["--calibration", "4", "--recovery", "3", "--audit", "8"]


def save(path, *, last=False, side=SIDE, batch=1, step=0.0):
    """The mean of each channel, and a linear map of these: 5 classes."""
    draws = np.random.default_rng(0)
    weight = draws.standard_normal((3, 5)).astype(np.float32)
    if step:
        weight = np.round(weight / step) * np.float32(step)
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[1, 2] if last else [2, 3], keepdims=0),
        helper.make_node("MatMul", ["m", "w"], ["y"]),
    ]
    sides = [batch, side, side, 3] if last else [batch, 3, side, side]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sides)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 5])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)
    return weight


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, more in {
        "one": {},
        "two": {"step": 0.5},
        "last": {"last": True},
        "any": {"side": "s", "batch": "n"},
        "large": {"side": 12},
    }.items():
        (tmp_path / name).mkdir()
        save(tmp_path / name / "m.onnx", **more)
    return tmp_path


def audit(*words):
    return main(["audit", *words, "--task", "classify", *COUNTS, "--json", "out.json"])


def loss():
    return json.loads(Path("out.json").read_text())["divergence"]["value"]


@pytest.mark.parametrize("how", list(KNOWN))
@pytest.mark.parametrize("last", [False, True])
def test_a_picture_is_given_as_the_graph_wants_it(tmp_path, how, last):
    weight = save(tmp_path / "m.onnx", last=last)
    model = with_pictures(read_onnx(tmp_path / "m.onnx", "classify"), how)
    settings = model.architecture.config["picture"]
    assert (settings["size"], settings["mean"], settings["std"]) == (SIDE, *KNOWN[how])
    pixels = torch.randn(4, 3, SIDE, SIDE)  # more than the one that the file is made for
    found = model.task.forward(model.module, {"pixels": pixels})[:, 0]
    assert torch.allclose(found, pixels.mean((2, 3)) @ torch.from_numpy(weight), atol=1e-5)


def test_two_files_are_compared_on_pictures(here, capsys):
    assert audit("one/m.onnx", "two/m.onnx", "--pictures", "imagenet") in (0, 1, 3)
    assert loss() > 1e-4
    assert audit("one/m.onnx", "last/m.onnx", "--pictures", "imagenet") == 0
    assert loss() < 2**-20  # the same model: rounding of float32, which counts as none
    assert audit("any/m.onnx", "one/m.onnx", "--pictures", f"unit@{SIDE}") == 0
    assert loss() < 2**-20


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("one/m.onnx", "two/m.onnx"), "does not say how it reads pictures"),
        (("one/m.onnx", "two/m.onnx", "--pictures", "grey"), "type one of imagenet, half"),
        (("one/m.onnx", "two/m.onnx", "--pictures", "unit@x"), "type one of imagenet, half"),
        (("any/m.onnx", "any/m.onnx", "--pictures", "unit"), "say it: --pictures unit@224"),
        (("one/m.onnx", "large/m.onnx", "--pictures", "unit"), "12"),
        (("one/m.onnx", "two/m.onnx", "--pictures", "unit", "--data", "d.npz"), "leave --pictures"),
    ],
)
def test_what_is_not_known_of_pictures_is_asked_for(here, capsys, words, says):
    assert audit(*words) == 2
    told = capsys.readouterr().err
    assert says in told and "hint: " in told
    assert not (here / "out.json").exists()
