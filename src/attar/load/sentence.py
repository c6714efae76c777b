"""A sentence encoder: BERT, the mean over its tokens, length one.

Source: Reimers and Gurevych 2019, https://arxiv.org/abs/1908.10084, section 3, mean strategy.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


class SentenceEncoder(nn.Module):
    """Token ids to one vector per sentence.

    Attributes:
        encoder: Returns an object with `last_hidden_state`, `samples tokens width`.
        normalise: Whether vectors are scaled to length one.
    """

    def __init__(self, encoder: nn.Module, *, normalise: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalise = normalise

    def forward(
        self,
        input_ids: Int64[Tensor, "samples tokens"],
        attention_mask: Tensor,
    ) -> Float[Tensor, "samples width"]:
        """Encode; positions where `attention_mask` is 0 or False count for nothing."""
        mask = attention_mask.long()
        hidden = self.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        weights = mask[:, :, None].to(hidden.dtype)
        # A sentence without tokens has no mean; it becomes zeros instead of NaN.
        mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=1) if self.normalise else mean
