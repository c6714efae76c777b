"""optimum-quanto: needs no data. The setting is the type of the weights; the rest stays float16."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from optimum.quanto import QModuleMixin, freeze, qint2, qint4, qint8, quantize
from peer import Job, main, plain, tied_head
from safetensors.torch import save_file

TYPES = {"qint2": qint2, "qint4": qint4, "qint8": qint8}


def compress(job: Job) -> None:
    model = job.model(torch.float16)
    tied = tied_head(model)
    quantize(model, weights=TYPES[job.setting], exclude=tied)
    freeze(model)
    left_out = {f"{name}.weight" for name in tied}
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k not in left_out}
    save_file(state, job.artifact / "model.safetensors")
    job.written()
    treated = {
        n: m.weight.dequantize() for n, m in model.named_modules() if isinstance(m, QModuleMixin)
    }
    job.judge(plain(model, treated))


main(compress)
