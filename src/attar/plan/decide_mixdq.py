"""Two metrics, priced apart and solved apart: what is answered, and how sure the answer is.

A divergence is the sum of two (see `Divergence.parts`): content, whether the original's answer
stays the answer, and quality, all the rest. Each candidate is tried alone and both are measured.
Units are split in two by which of the two they spoil more than the median unit does. Each half gets
its own share of the bytes and its own integer program over its own metric, so that the larger
metric cannot hide the smaller. Several shares are tried, and the plan that loses least is kept.

Source: Zhao et al. 2024, MixDQ: Memory-efficient few-step text-to-image diffusion models with
metric-decoupled mixed precision quantization, https://arxiv.org/abs/2405.17873, section 4.2.
We differ in four ways. The model need not make pictures: content and quality are parts of the
divergence, where the paper has structural similarity and signal-to-noise ratio. Units are split by
what was measured, where the paper knows which layers read the text. The best share is the one that
loses least, where the paper looks at the pictures. Its exact first token is a matter of activations
and not of this file.
"""

from collections.abc import Mapping, Sequence
from statistics import median

from attar.plan.solve import allowed, smallest, solve_by, weight_bytes
from attar.records import Candidate, Question, Trial

# Shares of the bytes beyond the smallest that go to the units that spoil content.
SHARES = 9

Options = Mapping[str, Sequence[Candidate]]


def decide(asked: Question) -> dict[str, Candidate]:
    """Try every candidate alone, split, solve each half for each share, keep the best."""
    candidates = allowed(asked.candidates)
    tried = {id(c): asked.trial({c.unit: c}) for of in candidates.values() for c in of}
    spoils = content_units(candidates, tried)
    content = {name: of for name, of in candidates.items() if name in spoils}
    quality = {name: of for name, of in candidates.items() if name not in spoils}
    plans = [
        both
        for number in range(SHARES)
        for both in [_solved(content, quality, tried, asked.limit, number / (SHARES - 1))]
    ]
    chosen = min(plans, key=lambda plan: asked.trial(plan).nats)
    return {name: chosen[name] for name in asked.candidates}


def content_units(candidates: Options, tried: Mapping[int, Trial]) -> set[str]:
    """Units whose damage is content for a larger share than that of the median unit."""
    shares = {}
    for name, of in candidates.items():
        found = [tried[id(c)] for c in of]
        whole = sum(t.nats for t in found)
        shares[name] = sum(t.content for t in found) / whole if whole > 0 else 0.0
    middle = median(shares.values())
    return {name for name, share in shares.items() if share > middle}


def _solved(
    content: Options, quality: Options, tried: Mapping[int, Trial], limit: int, share: float
) -> dict[str, Candidate]:
    """Solve each half within its share of what is left beyond the smallest candidates."""
    least = [weight_bytes(smallest(half)) for half in (content, quality)]
    spare = limit - sum(least)
    first = solve_by(content, least[0] + int(spare * share), lambda c: tried[id(c)].content)
    left = limit - weight_bytes(first)
    return {**first, **solve_by(quality, left, lambda c: tried[id(c)].quality)}
