"""Models of OpenVINO: compared with the torch network they were made from, and hostile files."""

import numpy as np
import openvino
import pytest
import torch
import toy_code
from openvino import opset13 as ops

from attar.cli import main
from attar.errors import ModelError
from attar.load.openvino_model import check_document, read_openvino

MODEL = "toy_code:classifier"


def graph_of(module, n_features, batch=-1):
    """Linear maps and what lies between them, as operations of OpenVINO."""
    inputs = ops.parameter([batch, n_features], np.float32, name="inputs")
    last = inputs
    for layer in module:
        if isinstance(layer, torch.nn.Linear):
            last = ops.matmul(last, ops.constant(layer.weight.numpy()), False, True)
            last = ops.add(last, ops.constant(layer.bias.numpy()))
        elif isinstance(layer, torch.nn.BatchNorm1d):
            scale = layer.weight / torch.sqrt(layer.running_var + layer.eps)
            shift = layer.bias - scale * layer.running_mean
            last = ops.add(ops.multiply(last, ops.constant(scale.numpy())), shift.numpy())
        else:
            assert isinstance(layer, torch.nn.ReLU)
            last = ops.relu(last)
    return openvino.Model([last], [inputs], "toy")


@pytest.fixture
def made():
    module = toy_code.classifier()
    module = module[0] if isinstance(module, tuple) else module
    return module.eval().requires_grad_(requires_grad=False)


@pytest.fixture
def file(tmp_path, made):
    path = tmp_path / "model.xml"
    openvino.save_model(graph_of(made, made[0].in_features), path, compress_to_fp16=False)
    return path


@pytest.mark.parametrize("batch", [-1, 1])
def test_it_answers_as_the_network_it_was_made_from(tmp_path, made, batch):
    path = tmp_path / "model.xml"
    graph = graph_of(made, made[0].in_features, batch)
    openvino.save_model(graph, path, compress_to_fp16=False)
    model = read_openvino(path, "classify")
    x = torch.randn(7, made[0].in_features)
    assert torch.allclose(model.module(x), made(x), atol=1e-5)
    assert model.source_bytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    assert [tuple(t.shape) for t in model.examples.values()] == [(2, made[0].in_features)]


def test_an_audit_finds_the_same_network_unchanged(tmp_path, file, capsys):
    data = toy_code.save_data(tmp_path / "data.npz", count=120)
    typed = ["audit", MODEL, str(file), "--task", "classify", "--data", str(data)]
    facts = tmp_path / "facts.json"
    assert main([*typed, "--json", str(facts)]) == 0
    said = capsys.readouterr().out
    assert "changed predictions  0.00%" in said or "changed predictions  0%" in said
    assert main([*typed, "--drift"]) == 2
    assert "no gradients" in capsys.readouterr().err


def test_without_a_task_it_is_asked_for(file):
    with pytest.raises(ModelError, match="does not say what it answers") as caught:
        read_openvino(file, None)
    assert "--task" in caught.value.hint


def test_without_its_weights_the_missing_file_is_named(file):
    file.with_suffix(".bin").unlink()
    with pytest.raises(ModelError, match=r"cannot read .*model\.bin"):
        read_openvino(file, "classify")


def test_weights_that_are_cut_short_are_refused_before_the_engine(file):
    weights = file.with_suffix(".bin")
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ModelError, match="has weights at bytes"):
        read_openvino(file, "classify")


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (b"<?xml", b'<!DOCTYPE net [<!ENTITY a "b">]><?xml', "entities"),
        (b'version="opset1"', b'version="custom"', "not of OpenVINO"),
        (b"</net>", b"", "not whole XML"),
        (b"<net ", b"<ten ", "not whole XML"),
        (b'offset="0"', b'offset="-8"', "has weights at bytes"),
        (b'offset="0"', b'offset="99999999999999999999"', "has weights at bytes"),
    ],
)
def test_hostile_documents_are_refused(file, before, after, found):
    document = file.read_bytes()
    assert before in document
    with pytest.raises(ModelError, match=found):
        check_document(document.replace(before, after, 1), 10**9, file)


def test_a_document_that_is_no_network_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no network of OpenVINO"):
        check_document(b"<html><body/></html>", 0, tmp_path / "page.xml")


def test_what_the_engine_cannot_run_is_one_line(file):
    document = file.read_bytes()
    file.write_bytes(document.replace(b'type="ReLU"', b'type="Nothing"', 1))
    with pytest.raises(ModelError, match="OpenVINO cannot run") as caught:
        read_openvino(file, "classify")
    assert "\n" not in str(caught.value.problem)
