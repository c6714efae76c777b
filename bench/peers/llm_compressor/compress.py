"""llm-compressor: GPTQ, groups of 64, on every linear map but the head, as its examples do; written
as compressed-tensors. The setting names the bits."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from peer import Job, main


def compress(job: Job) -> None:
    model, tokens = job.model(torch.float16), job.tokens
    bits = int(job.numbers()[0])
    arguments = QuantizationArgs(
        num_bits=bits, type="int", symmetric=False, strategy="group", group_size=64
    )
    groups = {"all": QuantizationScheme(targets=["Linear"], weights=arguments)}
    recipe = [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
    )
    weights = {
        name: p.detach().float().clone()
        for name, p in model.named_parameters()
        if name.endswith(("weight", "bias"))
    }
    model.save_pretrained(job.artifact, save_compressed=True)
    job.written()
    job.judge(weights)


main(compress)
