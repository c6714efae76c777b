"""How much two models' outputs differ, in nats per prediction, and its curvature by sampling.

Classifiers and language models: KL(original ‖ compressed). Regressors and embedders: half the
squared difference in output units whitened on calibration data, which is the KL of two Gaussians
whose covariance is that of the original's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attar.records import Batch


def predictions_mask(outputs: Tensor, batch: Batch) -> Bool[Tensor, "samples positions"]:
    """Say which outputs are predictions; all of them where the batch does not.

    Args:
        outputs: `samples positions width`.
    """
    return batch.get("mask", torch.ones(outputs.shape[:2], dtype=torch.bool))


def predictions_of(outputs: Tensor, batch: Batch) -> Float[Tensor, "predictions width"]:
    """Outputs that are predictions, of all samples in one row."""
    return outputs[predictions_mask(outputs, batch)]


@dataclass(frozen=True)
class Divergence:
    """A family of output distributions.

    Attributes:
        family: "categorical" (outputs are logits) or "gaussian" (outputs are means).
        whitening: Gaussian only: W with WᵀW the inverse covariance, `width width`.
    """

    family: str
    whitening: Tensor | None = None

    def between(
        self,
        original: Float[Tensor, "predictions width"],
        compressed: Float[Tensor, "predictions width"],
    ) -> Float[Tensor, " predictions"]:
        """Nats per prediction, ≥ 0 up to rounding."""
        if self.family == "gaussian":
            assert self.whitening is not None
            return 0.5 * ((compressed - original) @ self.whitening.T).square().sum(-1)
        log_p = original.log_softmax(-1)
        log_q = compressed.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def slope(
        self,
        original: Float[Tensor, "predictions width"],
        compressed: Float[Tensor, "predictions width"],
    ) -> Float[Tensor, "predictions width"]:
        """Gradient of `between` at the compressed outputs."""
        if self.family == "gaussian":
            assert self.whitening is not None
            return (compressed - original) @ self.whitening.T @ self.whitening
        return compressed.softmax(-1) - original.softmax(-1)

    def parts(
        self,
        original: Float[Tensor, "predictions width"],
        compressed: Float[Tensor, "predictions width"],
    ) -> tuple[Float[Tensor, " predictions"], Float[Tensor, " predictions"]]:
        """Split `between` into content and quality, which sum to it.

        Categorical, by the chain rule of the KL divergence: content is that of whether the answer
        is the original's most likely one, quality that of which other one it is, where it is not.
        Gaussian: content is what turns the whitened output, quality what lengthens it.
        """
        whole = self.between(original, compressed)
        if self.family == "gaussian":
            assert self.whitening is not None
            before, after = (out @ self.whitening.T for out in (original, compressed))
            along = torch.nn.functional.normalize(before, dim=-1)
            quality = 0.5 * ((after - before) * along).sum(-1).square()
            return whole - quality, quality
        best = original.argmax(-1, keepdim=True)
        log_p, log_q = (out.double().log_softmax(-1) for out in (original, compressed))
        one, two = (_both(log, best) for log in (log_p, log_q))
        content = (one.exp() * (one - two)).sum(-1).to(whole.dtype)
        return content, whole - content

    def sampled_gradient(
        self, outputs: Float[Tensor, "predictions width"], generator: torch.Generator
    ) -> Float[Tensor, "predictions width"]:
        """Gradient, at the outputs, of the log-likelihood of an answer sampled from them.

        The second moment of what this returns is the Fisher information, which is the Hessian of
        the divergence at zero change.
        Source: Martens 2020, New insights and perspectives on the natural gradient method,
        https://arxiv.org/abs/1412.1193, section 5.
        """
        if self.family == "gaussian":
            assert self.whitening is not None
            noise = torch.randn(outputs.shape, generator=generator)
            return noise @ self.whitening
        probabilities = outputs.softmax(-1)
        # By the inverse of the distribution function: many times faster than torch.multinomial.
        below = probabilities.cumsum(-1)
        place = torch.rand(len(outputs), 1, generator=generator) * below[:, -1:]
        answers = torch.searchsorted(below, place).clamp_(max=outputs.shape[-1] - 1)
        gradient = probabilities.neg_()
        return gradient.scatter_add_(-1, answers, torch.ones_like(answers, dtype=gradient.dtype))


def _both(log: Float[Tensor, "predictions width"], best: Tensor) -> Float[Tensor, "predictions 2"]:
    """Log-probabilities of one answer, and of all others together."""
    others = log.scatter(-1, best, -torch.inf).logsumexp(-1)
    return torch.stack([log.gather(-1, best)[..., 0], others], -1)


def fit_gaussian(outputs: Float[Tensor, "samples width"]) -> Divergence:
    """Whiten by the covariance of the original's outputs on calibration data, shrunk.

    Source: Chen, Wiesel, Eldar and Hero 2010, Shrinkage algorithms for MMSE covariance estimation,
    https://arxiv.org/abs/0907.4698, eq. 23 (oracle approximating shrinkage towards a multiple of
    the identity), so that directions unseen in few samples do not get infinite weight.
    """
    samples, width = outputs.shape
    centred = (outputs - outputs.mean(0)).double()
    covariance = centred.T @ centred / samples
    trace = covariance.trace()
    trace_of_square = covariance.square().sum()
    numerator = (1 - 2 / width) * trace_of_square + trace**2
    denominator = (samples + 1 - 2 / width) * (trace_of_square - trace**2 / width)
    shrinkage = 1.0 if denominator <= 0 else min(1.0, float(numerator / denominator))
    mean = trace / width
    covariance = (1 - shrinkage) * covariance + shrinkage * mean * torch.eye(width)
    values, vectors = torch.linalg.eigh(covariance)
    # A constant output has no spread to whiten by; count its change in plain units then.
    values = torch.where(values > 0, values, torch.ones_like(values))
    return Divergence("gaussian", ((vectors * values.rsqrt()) @ vectors.T).float())
