"""NNCF: `compress_weights` of the OpenVINO model, written by OpenVINO. The setting names mode and
group size, then options. Without "all layers" the embeddings and the last layer stay at 8 bits, as
is its default. Convolutions are given 8 bits at least, whatever is asked for.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import nncf
import numpy as np
import openvino as ov
import torch
from peer import Job, main, matched


def compress(job: Job) -> None:
    network, weights = converted(job)
    mode = nncf.CompressWeightsMode[job.setting.split(",")[0]]
    settings = {}
    if "INT4" in job.setting:
        settings = {"group_size": int(job.numbers()[0]), "ratio": 1.0}
        settings["all_layers"] = "all layers" in job.setting
        settings["awq"] = "AWQ" in job.setting or None
        settings["scale_estimation"] = "scale estimation" in job.setting or None
        if "AWQ" in job.setting:
            settings["dataset"] = nncf.Dataset(samples(job))
        if job.kind == "vision":  # its narrow layers have fewer columns than a group
            settings["advanced_parameters"] = nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
            )
    network = nncf.compress_weights(network, mode=mode, **settings)
    ov.save_model(network, job.artifact / "model.xml", compress_to_fp16=True)
    job.written()
    stored = constants(ov.Core().read_model(job.artifact / "model.xml"))
    job.judge(matched(weights, stored))


def converted(job: Job) -> tuple[ov.Model, dict[str, torch.Tensor]]:
    model = job.model(torch.float32)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    if job.kind == "vision":
        program = torch.export.load(job.folder / "model" / "program.pt2")
        return ov.convert_model(program), weights
    example = {"input_ids": job.tokens[:2], "attention_mask": job.calibration["attention"][:2]}
    return ov.convert_model(model, example_input=example), weights


def samples(job: Job) -> list[dict[str, np.ndarray]]:
    data = job.calibration
    return [
        {"input_ids": ids[None].numpy(), "attention_mask": mask[None].numpy()}
        for ids, mask in zip(data["tokens"], data["attention"], strict=True)
    ]


def constants(network: ov.Model) -> list[np.ndarray]:
    """Everything that is computed from constants alone and enters what is not."""
    fixed, found = set(), {}
    for node in network.get_ordered_ops():
        sources = [port.get_source_output() for port in node.inputs()]
        if node.get_type_name() == "Constant" or (
            sources and all(s.get_node().get_friendly_name() in fixed for s in sources)
        ):
            fixed.add(node.get_friendly_name())
            continue
        for source in sources:
            if (
                source.get_node().get_friendly_name() in fixed
                and source.get_element_type().is_real()
            ):
                found[source.get_node().get_friendly_name()] = source
    print(json.dumps(sorted(found)[:5]))
    return [value_of(source) for source in found.values()]


def value_of(output: ov.Output) -> np.ndarray:
    result = ov.Core().compile_model(
        ov.Model([output], []), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return result([])[0].astype(np.float32)


main(compress)
