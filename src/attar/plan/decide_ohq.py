"""Integer program over measured sensitivity and measured time on this machine.

Each unit's candidates are tried one at a time, all else left original: the divergence is its
sensitivity, and the time that its stored tensors take to become a weight again is its cost on this
machine (all that a treatment changes of how long a model runs here). Both are divided by the
largest there is, and the weighted sum is minimised within the bytes.

Source: Huang et al. 2023, OHQ: On-chip hardware-aware quantization,
https://arxiv.org/abs/2309.01945, sections 3.2 to 3.4. We differ in four ways. A candidate is tried
outright, on recovery data, where the paper estimates its loss from a masked operator and made-up
inputs. There is no meter of energy, so that term is left out. The limit is on bytes. Candidates are
those of the menu, not only widths. Times differ from run to run, so the same command may decide
otherwise; `attar apply` on the written plan gives the same bytes.
"""

from attar.plan.solve import allowed, solve_by
from attar.records import Candidate, Question

# Weight of time beside sensitivity, each as a share of the largest there is.
TIME_WEIGHT = 0.01


def decide(asked: Question) -> dict[str, Candidate]:
    """Try every candidate, and solve."""
    candidates = allowed(asked.candidates)
    flat = [c for of in candidates.values() for c in of]
    lost = {id(c): asked.trial({c.unit: c}).nats for c in flat}
    seconds = {id(c): asked.seconds(c) for c in flat}
    most_lost, longest = max(lost.values()) or 1.0, max(seconds.values()) or 1.0
    return solve_by(
        candidates,
        asked.limit,
        lambda c: lost[id(c)] / most_lost + TIME_WEIGHT * seconds[id(c)] / longest,
    )
