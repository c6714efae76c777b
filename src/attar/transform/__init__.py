"""Treatments of one weight: one file per method, and the table of them."""

from typing import Any

from attar.transform.factorize_low_rank import FactorizeLowRank
from attar.transform.keep_float import KeepFloat
from attar.transform.quantize_binary import QuantizeBinary
from attar.transform.quantize_codebook import QuantizeCodebook
from attar.transform.quantize_entropy import QuantizeEntropy
from attar.transform.quantize_feedback import QuantizeFeedback
from attar.transform.quantize_levels import QuantizeLevels
from attar.transform.quantize_llama import QuantizeLlama
from attar.transform.quantize_low_rank import QuantizeLowRank
from attar.transform.quantize_outliers import QuantizeOutliers
from attar.transform.quantize_rtn import QuantizeRtn
from attar.transform.zero_n_m import ZeroNM
from attar.transform.zero_unstructured import ZeroUnstructured

TRANSFORMS: dict[str, type[Any]] = {
    "factorize_low_rank": FactorizeLowRank,
    "keep_float": KeepFloat,
    "quantize_binary": QuantizeBinary,
    "quantize_codebook": QuantizeCodebook,
    "quantize_entropy": QuantizeEntropy,
    "quantize_feedback": QuantizeFeedback,
    "quantize_levels": QuantizeLevels,
    "quantize_llama": QuantizeLlama,
    "quantize_low_rank": QuantizeLowRank,
    "quantize_outliers": QuantizeOutliers,
    "quantize_rtn": QuantizeRtn,
    "zero_n_m": ZeroNM,
    "zero_unstructured": ZeroUnstructured,
}
"""File name in this folder to the settings that hold its method."""
