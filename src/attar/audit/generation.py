"""Greedy continuations of the same prompts by both models: where they part, length, repetition.

A language model is used by letting it write. A token that differs changes all that follow, so the
place of the first one says more than the share of changed predictions does.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import numpy as np

from attar.audit.fidelity import bootstrap, resamples
from attar.records import Estimate, Generation, Parted

# Runs of so many tokens count as repeated.
RUN = 4
EXAMPLES = 3
END = "<end of text>"

Tokens = Sequence[int]


def compare_continuations(
    before: Sequence[Tokens],
    after: Sequence[Tokens],
    *,
    ends: Container[int],
    most_tokens: int,
    seed: int,
    examples: Sequence[Parted] = (),
) -> Generation:
    """Measure how far the continuations of the same prompts agree.

    Args:
        before: Of the original, one for each prompt; an end token is the last one.
        after: Of the compressed model, likewise.
    """
    pairs = list(zip(before, after, strict=True))
    alone = np.arange(len(pairs))
    parted = [first_difference(*pair) for pair in pairs]
    alike = [len(pair[0]) if at is None else at for pair, at in zip(pairs, parted, strict=True)]
    lengths = [np.array([text_length(text, ends) for text in side]) for side in (before, after)]
    repeated = [_repeated(side, own) for side, own in zip((before, after), lengths, strict=True)]
    ended = [np.array([text[-1] in ends for text in side]) for side in (before, after)]
    equal = [_equal(*pair) for pair in pairs]
    of = np.repeat(alone, [len(one) for one in equal])

    def mean(values: np.ndarray) -> Estimate:
        return bootstrap(values.astype(float), alone, seed=seed)

    return Generation(
        n_prompts=len(pairs),
        most_tokens=most_tokens,
        first_divergent_token=mean(np.array(alike)),
        first_divergent_median=median(np.array(alike), seed),
        never_differs=mean(np.array([at is None for at in parted])),
        equal_tokens=bootstrap(np.concatenate(equal).astype(float), of, seed=seed),
        length_before=mean(lengths[0]),
        length_after=mean(lengths[1]),
        length_change=mean(lengths[1] - lengths[0]),
        ended_before=mean(ended[0]),
        ended_after=mean(ended[1]),
        repetition_before=mean(repeated[0]),
        repetition_after=mean(repeated[1]),
        repetition_change=mean(repeated[1] - repeated[0]),
        examples=tuple(examples),
    )


def first_difference(one: Tokens, other: Tokens) -> int | None:
    """Position of the first token that differs, from 0; None where none does.

    A text that ended holds its end token, so one is never the beginning of the other.
    """
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), None)


def text_length(tokens: Tokens, ends: Container[int]) -> int:
    """Tokens before the one that ends the text."""
    return len(tokens) - (tokens[-1] in ends)


def repeated_share(tokens: Tokens) -> float:
    """Share of runs of `RUN` tokens that stood in the same text before; 0 where there is no run.

    Source: Welleck et al. 2019, https://arxiv.org/abs/1908.04319 (seq-rep-n): one less the
    share of runs that are unique. Theirs is over long texts and without an end.
    """
    runs = [tuple(tokens[at : at + RUN]) for at in range(len(tokens) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _repeated(texts: Sequence[Tokens], lengths: np.ndarray) -> np.ndarray:
    """Repeated share of each text without what ends it."""
    pairs = zip(texts, lengths.tolist(), strict=True)
    return np.array([repeated_share(text[:n]) for text, n in pairs])


def _equal(one: Tokens, other: Tokens) -> np.ndarray:
    """Whether both have the same token, at every position that either has."""
    found = np.zeros(max(len(one), len(other)), bool)
    shared = min(len(one), len(other))
    found[:shared] = np.asarray(one[:shared]) == np.asarray(other[:shared])
    return found


def median(values: np.ndarray, seed: int) -> Estimate:
    """Median over prompts with a 95% interval, as `bootstrap` makes it of the mean."""
    parts = [np.median(values[drawn], axis=1) for drawn in resamples(len(values), seed)]
    low, high = np.quantile(np.concatenate(parts), [0.025, 0.975])
    return Estimate(float(np.median(values)), float(low), float(high))


def earliest(
    prompts: Sequence[Tokens],
    before: Sequence[Tokens],
    after: Sequence[Tokens],
    decode: Callable[[list[int]], str],
    ends: Container[int],
) -> list[Parted]:
    """Show the prompts whose continuations part first."""
    found = [
        (at, number)
        for number, pair in enumerate(zip(before, after, strict=True))
        if (at := first_difference(*pair)) is not None
    ]

    def shown(at: int, number: int) -> Parted:
        def text(tokens: Tokens, start: int, end: int | None) -> str:
            """Decoded with what stands before, so that spaces at the seams are kept."""
            lead = [*prompts[number], *tokens[:start]]
            own = list(tokens[start:end])
            if own and own[-1] in ends:
                return text(tokens, start, start + len(own) - 1) + END
            return decode([*lead, *own]).removeprefix(decode(lead))

        one, other = before[number], after[number]
        return Parted(
            prompt=decode(list(prompts[number])),
            position=at,
            same=text(one, 0, at),
            before=text(one, at, at + 1),
            after=text(other, at, at + 1),
            before_rest=text(one, at + 1, None),
            after_rest=text(other, at + 1, None),
        )

    return [shown(*one) for one in sorted(found)[:EXAMPLES]]
