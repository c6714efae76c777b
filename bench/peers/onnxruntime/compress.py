"""onnxruntime's own quantizer: static with three ways to find ranges, and dynamic; per channel."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import onnxruntime
from integers import Job, main
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

METHODS = {
    "MinMax": CalibrationMethod.MinMax,
    "Entropy": CalibrationMethod.Entropy,
    "Percentile": CalibrationMethod.Percentile,
}


class Reader(CalibrationDataReader):
    """Samples one by one, as its quantizer asks for them."""

    def __init__(self, job: Job) -> None:
        self._samples = job.samples("calibration")

    def get_next(self) -> dict | None:
        """Give the next sample, and None at the end."""
        return next(self._samples, None)


def compress(job: Job) -> None:
    prepared, out = job.out / "prepared.onnx", job.artifact / "model.onnx"
    quant_pre_process(job.folder / "model.onnx", prepared, skip_symbolic_shape=True)
    kind, _, method = job.setting.partition(" ")
    if kind == "dynamic":
        # Convolutions of signed weights have no dynamic kernel.
        weights = QuantType.QUInt8 if method == "uint8" else QuantType.QInt8
        quantize_dynamic(prepared, out, per_channel=True, weight_type=weights)
    else:
        quantize_static(
            prepared, out, Reader(job), per_channel=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, calibrate_method=METHODS[method],
        )  # fmt: skip
    job.written()
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    job.answer(lambda sample: session.run(None, sample)[0])


main(compress)
