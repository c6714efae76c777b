"""HQQ: needs no data. The setting names bits and group size; embeddings and norms stay float16."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from peer import Job, main, plain


def compress(job: Job) -> None:
    model = job.model(torch.float16)
    bits, group_size = (int(n) for n in job.numbers())
    config = BaseQuantizeConfig(nbits=bits, group_size=group_size)
    AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.float16, device="cpu")
    AutoHQQHFModel.save_quantized(model, str(job.artifact))
    job.written()
    treated = {n: m.dequantize() for n, m in model.named_modules() if isinstance(m, HQQLinear)}
    job.judge(plain(model, treated))


main(compress)
