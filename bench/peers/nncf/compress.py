"""NNCF's post-training quantization, run by OpenVINO in 8 bits."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import nncf
import openvino
from integers import Job, main


def compress(job: Job) -> None:
    samples = list(job.samples("calibration"))
    preset, _, kind = job.setting.partition(" ")
    small = nncf.quantize(
        openvino.Core().read_model(job.folder / "model.onnx"),
        nncf.Dataset(samples),
        preset=nncf.QuantizationPreset(preset),
        model_type=nncf.ModelType.TRANSFORMER if kind == "transformer" else None,
        subset_size=len(samples),
    )
    openvino.save_model(small, job.artifact / "model.xml")
    job.written()
    compiled = openvino.compile_model(job.artifact / "model.xml", "CPU")
    job.answer(lambda sample: compiled(sample)[0])


main(compress)
