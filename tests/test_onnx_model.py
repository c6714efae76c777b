"""Writing ONNX: onnxruntime answers as torch does, in floats and in 8 bits, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn
from toys import PICTURE, byte_tokenizer, numbered_text, toy, write_pictures

from attar import pipeline
from attar.activations import RoundedModule, activation_of, roundings
from attar.cli import main
from attar.errors import ModelError, PlanError, SettingError
from attar.export import onnx_model
from attar.export.onnx_graph import _readings, export_floats, float_graph, readers
from attar.export.onnx_nodes import Codes, Stored, Writer
from attar.load.onnx_model import OnnxModule, read_onnx
from attar.load.sentence import SentenceEncoder
from attar.load.units import list_units
from attar.onnx_names import FILE
from attar.records import Activation, Candidate, Cost, Recipe, Silent
from attar.session import open_session
from attar.transform.apply import Treated, build_transform, substitutions
from attar.writing import _for_onnx


class Blocks(nn.Module):
    """What EfficientNet-Lite is made of: padding of its own, depthwise, clamps, a sum, a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 12, 3, stride=2, bias=False)
        self.deep = nn.Conv2d(12, 12, 3, groups=12, padding=1)
        self.project = nn.Conv2d(12, 12, 1)
        self.expand = nn.Conv2d(12, 20, 1)
        self.head = nn.Linear(20, 7)

    def forward(self, pixels):
        x = F.relu6(self.stem(F.pad(pixels, [0, 1, 0, 1])) * 3)
        x = x + self.project(F.relu6(self.deep(x)))
        return self.head(F.relu(self.expand(x)).mean((2, 3)))


def picture_model():
    return toy(
        "classify", Blocks(), {}, {"picture": PICTURE}, {"pixels": torch.zeros(2, 3, 33, 33)}
    )


def sentence_model():
    from transformers.models.bert.modeling_bert import BertConfig, BertModel

    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=264,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=512,
    )
    module = SentenceEncoder(BertModel(config, add_pooling_layer=False), normalise=True)
    tokens = torch.arange(12).reshape(2, 6)
    examples = {"tokens": tokens, "attention": torch.ones_like(tokens)}
    files = {"tokenizer.json": byte_tokenizer(sentence=True)}
    return toy("embed", module, files, {}, examples)


def inputs_of(model, samples=5):
    generator = torch.Generator().manual_seed(3)
    if model.task.name == "classify":
        return {"pixels": torch.randn(samples, 3, 33, 33, generator=generator)}
    tokens = torch.randint(0, 260, (samples, 11), generator=generator)
    attention = torch.ones_like(tokens)
    attention[1:2, 7:] = 0
    return {"tokens": tokens, "attention": attention}


MODELS = {"pictures": picture_model(), "sentences": sentence_model()}
EACH = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


_exported = {}


def exported(model):
    """In floats; torch takes seconds for it."""
    if model.name not in _exported:
        _exported[model.name] = export_floats(model.module, model.examples, model.task.name)
    return _exported[model.name]


def graph_of(model):
    return float_graph(model.module, model.examples, list_units(model), model.task.name)


@EACH
def test_a_graph_in_floats_answers_as_the_module_does(model):
    made = exported(model)
    batch = inputs_of(model)
    module = OnnxModule(made.SerializeToString(), by_sample=False)
    assert torch.allclose(
        module(*batch.values()), model.module(*batch.values()), atol=1e-5, rtol=1e-5
    )


@EACH
def test_a_graph_names_nothing_of_the_machine_it_was_made_on(model):
    written = exported(model).SerializeToString()
    assert b".py" not in written and b"site-packages" not in written


def treated_as(model, settings_of):
    """Choices, and what each unit is stored as."""
    choices, treated = {}, {}
    for unit in list_units(model):
        treatment, settings, around = settings_of(unit)
        transform = build_transform(treatment, settings)
        weight = model.module.get_parameter(f"{unit.name}.weight").reshape(unit.rows, -1)
        made = transform.apply(weight, None)
        treated[unit.name] = Treated(unit, transform, made.tensors)
        cost = Cost(sum(t.nbytes for t in made.tensors.values()), 0)
        choices[unit.name] = Candidate(unit.name, treatment, settings, cost, 0.0, None, *around)
    return choices, treated


def both_answers(model, choices, treated, batch):
    """Of onnxruntime, and of the same numbers in torch."""
    units = {name: _for_onnx(one, choices[name]) for name, one in treated.items()}
    described = {"task": model.task.name}
    content = onnx_model.file_contents(graph_of(model), units, {}, described)[FILE]
    proto = onnx.ModelProto.FromString(content)
    onnx.checker.check_model(proto, full_check=True)
    simulated = RoundedModule(model.module, substitutions(treated), roundings(choices))
    with torch.no_grad():
        return run_alone(content, batch), simulated(*batch.values()), proto


def run_alone(content, batch):
    """One sample at a time; MatMulNBits in floats, as it is priced (else it rounds its inputs)."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    fed = [
        {name: x[n : n + 1].numpy() for name, x in batch.items()}
        for n in range(len(next(iter(batch.values()))))
    ]
    return torch.cat([torch.from_numpy(session.run(None, one)[0]) for one in fed])


INT8 = ("quantize_feedback", {"bits": 8, "group_size": 0, "symmetric": True})
STATIC = activation_of(-3.0, 5.0)


def static(unit):
    output = STATIC if unit.name in ("project", "expand") else None
    return (*INT8, () if unit.kind == "embedding" else (STATIC, output))


def dynamic(unit):
    return (*INT8, () if unit.kind == "embedding" else (Activation(), None))


def rows(unit):
    by_row = len(unit.shape) == 2
    return (*INT8, () if unit.kind == "embedding" else (Activation(by_row=by_row), None))


def weights_only(unit):
    return (*INT8, ())


def four_bits(unit):
    size = {True: 16, False: 0}[unit.columns % 16 == 0]
    symmetric = unit.rows % 3 == 0
    return "quantize_rtn", {"bits": 4, "group_size": size, "symmetric": symmetric}, ()


def floats(unit):
    return "keep_float", {"bits": 16}, ()


def thin(unit):
    rank = unit.n_weights * 2 // 3 // (unit.rows + unit.columns)
    if unit.groups > 1 or rank < 1:
        return floats(unit)
    return "factorize_low_rank", {"rank": rank, "bits": 16}, ()


@EACH
@pytest.mark.parametrize("treat", [static, dynamic, rows, weights_only, four_bits, floats, thin])
def test_onnxruntime_gives_the_numbers_that_were_priced(model, treat):
    batch = inputs_of(model)
    theirs, ours, _ = both_answers(model, *treated_as(model, treat), batch)
    exact = model.module(*batch.values())
    # The mean of rounded numbers may lie in the middle of two codes, and sums in another order then
    # take the other one. A wrong scale or layout would be off by as much as the treatment, or more.
    treatment = float((ours - exact).norm())
    assert float((theirs - ours).norm()) < max(0.5 * treatment, 1e-4 * float(exact.norm()))


@EACH
def test_a_factored_weight_is_two_products_that_hold_and_do_less(model):
    choices, treated = treated_as(model, thin)
    _, _, proto = both_answers(model, choices, treated, inputs_of(model, 1))
    held = {one.name: tuple(one.dims) for one in proto.graph.initializer}
    factored = [one for one in treated.values() if "middle" in one.tensors]
    assert len(factored) >= 3
    for one in factored:
        name, rank = one.unit.name, one.transform.rank
        sizes = [int(np.prod(held[f"{name}/{part}/weight"])) for part in ("left", "right")]
        assert sizes == [rank * one.unit.rows, rank * one.unit.columns]
        assert sum(sizes) < one.unit.n_weights
    reads = [node.op_type for node in proto.graph.node if "/scaled" in "".join(node.input)]
    assert len(reads) >= len(factored)


def ran(model, content):
    """Operators that onnxruntime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = "optimized.onnx"
    options.log_severity_level = 3
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load("optimized.onnx").graph.node]


def test_an_engine_multiplies_integers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = {
        ("pictures", static): {"QLinearConv": 4},
        ("pictures", dynamic): {"ConvInteger": 4, "DynamicQuantizeMatMul": 1},
        ("sentences", static): {"MatMulIntegerToFloat": 12},
        # q, k and v share what they read, so it is rounded by itself.
        ("sentences", dynamic): {"DynamicQuantizeMatMul": 6, "MatMulIntegerToFloat": 6},
        ("pictures", rows): {"ConvInteger": 4, "MatMulInteger": 1},
        # Sums of weights are made as the file is opened; those left are the mean of the tokens.
        ("sentences", rows): {"MatMulInteger": 12, "ReduceSum": 2},
        ("sentences", four_bits): {"MatMulNBits": 12},
    }

    def needed(unit):  # products that are not rounded by what reads them
        output = STATIC if unit.name in ("project", "expand", "deep", "stem") else None
        return (*INT8, () if unit.kind == "embedding" else (STATIC, output))

    for (name, treat), kinds in wanted.items():
        model = MODELS[name]
        chosen = needed if treat is static else treat
        _, _, proto = both_answers(model, *treated_as(model, chosen), inputs_of(model, 1))
        found = ran(model, proto.SerializeToString())
        assert {kind: found.count(kind) for kind in kinds} == kinds, (name, found)


def test_a_convolution_has_no_rows():
    model = MODELS["pictures"]
    choices, treated = treated_as(model, dynamic)
    wrong = replace(choices["deep"], input=Activation(by_row=True))
    with pytest.raises(PlanError, match="deep is a convolution") as raised:
        _for_onnx(treated["deep"], wrong)
    assert "dynamic: true" in raised.value.hint


def test_who_reads_a_product_is_seen_through_clamps():
    found = readers(graph_of(MODELS["pictures"]))
    assert found == {"stem": None, "deep": frozenset({"project"}), "project": None, "expand": None}


def test_a_bias_lies_in_steps_of_the_sum():
    model = MODELS["pictures"]
    choices, treated = treated_as(model, static)
    _, _, proto = both_answers(model, choices, treated, inputs_of(model, 1))
    stored = {one.name: numpy_helper.to_array(one) for one in proto.graph.initializer}
    steps = STATIC.scale * treated["project"].tensors["scale"].flatten().double().numpy()
    bias = model.module.project.bias.double().numpy()
    assert stored["project/bias"].dtype == np.int32
    assert np.abs(stored["project/bias"] * steps - bias).max() <= 0.51 * steps.max()


def test_a_bias_of_too_many_steps_stays_a_float():
    """As where a folded norm switched a channel off: a large bias beside tiny weights."""
    model = MODELS["pictures"]
    graph = onnx.ModelProto.FromString(exported(model).SerializeToString()).graph
    bias = next(one for one in graph.initializer if one.name == "project.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(12, 1e5, np.float32), bias.name))
    unit = list_units(model).named("project")
    codes = torch.full((unit.rows, unit.columns), 130, dtype=torch.uint8)
    middle = torch.full((unit.rows, 1), 128, dtype=torch.uint8)
    for scale, held in ((1e-6, "project.bias"), (1.0, "project/bias/float")):
        weight = Codes(codes, torch.full((unit.rows, 1), scale).half(), middle, 8, True)
        assert Writer(graph)._bias("project.bias", Stored(unit, weight, STATIC)) == held


def test_a_weight_that_the_graph_does_not_hold_is_refused():
    model = MODELS["pictures"]
    graph = onnx.ModelProto.FromString(exported(model).SerializeToString()).graph
    unit = list_units(model).named("project")
    assert [one.weight for one in _readings(graph, model.module, unit)] == ["project.weight"]
    graph.node.append(onnx.helper.make_node("Tanh", ["project.weight"], ["more"]))
    with pytest.raises(ModelError, match="also read by Tanh"):
        _readings(graph, model.module, unit)
    held = next(one for one in graph.initializer if one.name == "project.weight")
    held.CopyFrom(numpy_helper.from_array(np.zeros((12, 12, 1, 1), np.float32), held.name))
    with pytest.raises(ModelError, match="not found"):
        _readings(graph, model.module, unit)


# --- end to end


# Of tiny models, most of which is the graph.
SIZES = {"pictures": "9kB", "sentences": "90kB"}


def recipe(tmp_path, model, **more):
    data = tmp_path / "data"
    if model.task.name == "classify":
        write_pictures(data, 40)
    else:
        data.mkdir()
        data = data / "text.txt"
        data.write_text(numbered_text(60))
    sizes = {"calibration": 16, "recovery": 8, "audit": 16}
    return Recipe(model.name, data=str(data), to="onnx", rounds=1, **sizes, **more)


def compress(tmp_path, model, **more):
    asked = recipe(tmp_path, model, **more)
    report = pipeline.compress_session(open_session(asked, model, Silent()), tmp_path / "out")
    return report, tmp_path / "out"


@pytest.mark.parametrize(("name", "kind"), [("pictures", "static"), ("sentences", "dynamic")])
def test_compressed_end_to_end(tmp_path, name, kind, capsys):
    model = MODELS[name]
    report, out = compress(tmp_path, model, size=SIZES[name], activations=kind)
    written = sum(f.stat().st_size for f in out.iterdir() if f.is_file())
    assert written == report.bytes_after <= report.plan.budget.weight_bytes
    rounded = [name for name, c in report.plan.choices.items() if c.input is not None]
    assert rounded
    kinds = {report.plan.choices[name].input.scale is None for name in rounded}
    assert kinds == {kind == "dynamic"}
    assert any("are done in 8 bits" in note for note in report.plan.notes)
    assert any("onnxruntime" in note for note in report.plan.notes)
    # What the audit saw is what the file says, run by a stranger.
    again = read_onnx(out / FILE)
    batch = inputs_of(model)
    simple = again.task.forward(again.module, batch)
    assert simple.shape == model.task.forward(model.module, batch).shape
    assert again.files.keys() - {"report"} == model.files.keys()
    if model.task.name == "embed":
        assert main(["run", str(out), "a text", "another"]) == 0
        assert "cosine" in capsys.readouterr().out


def test_a_plan_is_applied_again_to_the_same_bytes(tmp_path, monkeypatch):
    from attar import reopening

    model = MODELS["pictures"]
    _, out = compress(tmp_path, model, size=SIZES["pictures"], activations="static")
    monkeypatch.setattr(
        reopening, "open_recipe", lambda own, progress: open_session(own, model, Silent())
    )
    plan = out / "report" / "plan.yaml"
    pipeline.apply_plan_file(plan, tmp_path / "again", recipe=Recipe(""))
    assert (tmp_path / "again" / FILE).read_bytes() == (out / FILE).read_bytes()
    text = plan.read_text()
    assert "input: {scale:" in text
    bad = text.replace("symmetric: true, input", "symmetric: false, input", 1)
    plan.write_text(bad)
    with pytest.raises(PlanError, match="do not go with them"):
        pipeline.apply_plan_file(plan, tmp_path / "bad", recipe=Recipe(""))
    plan.write_text(text.replace("zero_point: ", "zero_point: 9", 1).replace("9", "9999", 1))
    with pytest.raises(PlanError):
        pipeline.apply_plan_file(plan, tmp_path / "bad", recipe=Recipe(""))


def test_without_onnxruntime_the_same_numbers_are_judged_in_torch(tmp_path, monkeypatch):
    from attar import judging

    monkeypatch.setattr(judging, "find_spec", lambda name: None)
    report, _ = compress(tmp_path, MODELS["pictures"], size=SIZES["pictures"], activations="static")
    assert any("not installed" in note for note in report.plan.notes)
    assert report.verdict.divergence.value > 0


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path):
    with pytest.raises(SettingError, match="gain nothing"):
        pipeline.compress(Recipe("x", "50%", activations="static"), tmp_path / "x")
    with pytest.raises(SettingError, match="cannot be 'int8'"):
        pipeline.compress(Recipe("x", "50%", activations="int8", to="onnx"), tmp_path / "x")
    with pytest.raises(ModelError, match="its task is language"):
        onnx_model.check_model("language", "smollm2")


# --- reading


def small_graph(**more):
    helper = onnx.helper
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 3])
    nodes = [helper.make_node("Relu", ["x"], ["y"], **more)]
    graph = helper.make_graph(nodes, "g", [x], [y])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    made.ir_version = 10
    return made


def test_a_file_from_elsewhere_says_what_it_answers(tmp_path):
    path = tmp_path / "relu.onnx"
    path.write_bytes(small_graph().SerializeToString())
    with pytest.raises(ModelError, match="does not say what it answers"):
        read_onnx(path)
    model = read_onnx(path, "regress")
    assert model.module(torch.tensor([[-1.0, 0.0, 2.0]])).tolist() == [[0.0, 0.0, 2.0]]
    assert list(model.examples["x"].shape) == [2, 3]


def test_what_is_not_safe_or_not_whole_is_refused(tmp_path):
    path = tmp_path / "bad.onnx"
    whole = small_graph().SerializeToString()
    strange = small_graph()
    strange.graph.node[0].domain = "my.own"
    strange.opset_import.append(onnx.helper.make_opsetid("my.own", 1))
    outside = small_graph()
    held = numpy_helper.from_array(np.zeros(3, np.float32), "w")
    held.ClearField("raw_data")
    held.data_location = onnx.TensorProto.EXTERNAL
    entry = held.external_data.add()
    entry.key, entry.value = "location", "../secret"
    outside.graph.initializer.append(held)
    described = small_graph()
    entry = described.metadata_props.add()
    entry.key, entry.value = "attar", json.dumps([1])
    wrong = small_graph()
    wrong.graph.node[0].op_type = "NoSuchOperator"
    for content in (
        b"", whole[: len(whole) // 2], whole[::-1], strange.SerializeToString(),
        outside.SerializeToString(), described.SerializeToString(), wrong.SerializeToString(),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ModelError):
            read_onnx(path, "regress")
    with pytest.raises(ModelError, match="cannot read"):
        read_onnx(tmp_path / "none.onnx", "regress")
