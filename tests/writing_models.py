"""Language models in files that differ a little, and commands that compare them."""

import torch
from tiny_models import LLAMA, random_model, write_gguf

FEW = ["--data", "t.txt", "--calibration", "300", "--recovery", "300", "--audit", "2048"]


def write_models(folder, *noise):
    """a.gguf, and for each amount of noise b.gguf, c.gguf and so on."""
    names = []
    for number, amount in enumerate((0.0, *noise)):
        module = random_model(LLAMA)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(amount * torch.randn_like(parameter))
        names.append(f"{'abcdefgh'[number]}.gguf")
        write_gguf(folder / names[-1], module, LLAMA)
    return names
