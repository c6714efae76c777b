"""AutoRound: a preset such as "W4A16G64", tuned ("200 steps") or not ("0 steps"); or "auto 3.0
bits 200 steps": AutoScheme over 2, 4 and 8 bits. Embeddings stay 16 bits, as it leaves them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from auto_round import AutoRound, AutoScheme
from peer import Job, main
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

OPTIONS = ("W2A16G64", "W4A16G64", "W8A16G64")


def compress(job: Job) -> None:
    model, tokens = job.model(torch.float16), job.tokens
    scheme, steps = job.setting.split()[0], int(job.numbers()[-1])
    data = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens
    ]
    loader = DataLoader(data, batch_size=None)
    if scheme == "auto":
        scheme = AutoScheme(avg_bits=job.numbers()[0], options=OPTIONS)
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.folder / "model"),
        scheme=scheme,
        dataset=loader,
        iters=steps,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounded, _ = rounder.quantize()
    weights = {name: p.detach().float().clone() for name, p in rounded.named_parameters()}
    rounder.save_quantized(str(job.artifact), format="auto_round")
    job.written()
    job.judge(weights)


main(compress)
