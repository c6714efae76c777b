"""Ask a decider, and find out what it asks: units treated, all others original, measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attar import pricing, protecting
from attar.divergence import predictions_of
from attar.errors import SettingError
from attar.export import FUSED_ROLES
from attar.parallel import in_order, one_thread
from attar.plan import DECIDERS
from attar.plan.choose import choose
from attar.plan.fuse import expand, fuse, fuse_protected, groups_of
from attar.plan.solve import smallest
from attar.records import Batch, Candidate, Question, Recipe, Statistics, Trial
from attar.session import Session
from attar.sites import substituted
from attar.tables import check_name
from attar.transform.apply import Treated, build_transform, substitutions, treat_as_chosen

# Samples of the recovery data that trials run on; a language model's have hundreds of predictions.
SAMPLES, SEQUENCES = 8, 2
# Predictions compared at once.
ROWS_AT_ONCE = 128
# A time is the shortest of so many.
TIMED = 3

Key = tuple[str, str, str]


def check_decider(recipe: Recipe) -> None:
    """Refuse a decider that is not there.

    Raises:
        SettingError: With those that are.
    """
    check_name(DECIDERS, "decider", recipe.decide)


class Trials:
    """Trials of one model; what was made or measured once is kept, as codes and numbers."""

    def __init__(self, session: Session, statistics: Statistics) -> None:
        self.session = session
        self.statistics = statistics
        self.protected = protecting.protected(session, statistics)
        self._made: dict[Key, Treated] = {}
        self._measured: dict[tuple[Key, ...], Trial] = {}
        self._outputs: list[tuple[Batch, Tensor]] = []

    @property
    def rounds(self) -> int:
        """Turns of solve, measure, correct: what was measured anyway is not corrected."""
        recipe = self.session.recipe
        return max(1, recipe.rounds) if recipe.decide == "price" else 1

    def decide(
        self, candidates: Mapping[str, Sequence[Candidate]], limit: int
    ) -> dict[str, Candidate]:
        """Ask the recipe's decider, and spend what no candidate fits.

        Raises:
            SettingError: The form has fusion groups, of which only "price" knows.
        """
        session = self.session
        recipe, groups = session.recipe, self._groups(candidates)
        if groups and recipe.decide != "price":
            raise SettingError(
                f"{recipe.to} reads {', '.join(groups[0])} as one, and {recipe.decide} decides "
                "about each alone.",
                hint="use --decide price.",
            )

        def ask(merged: Mapping[str, Sequence[Candidate]], limit: int) -> dict[str, Candidate]:
            asked = Question(
                candidates=merged,
                limit=limit,
                units=session.units,
                statistics=self.statistics,
                seed=recipe.seed,
                trial=self.trial,
                seconds=self.seconds,
                weight=lambda name: session.weight(session.units.named(name)),
                protected=fuse_protected(self.protected, groups),
            )
            with session.timed("decide"):
                return DECIDERS[recipe.decide](asked)

        return choose(
            candidates,
            limit,
            units=session.units,
            groups=groups,
            build=build_transform,
            decide=ask,
        )

    def smallest(self, candidates: Mapping[str, Sequence[Candidate]]) -> dict[str, Candidate]:
        """Take the fewest bytes for every unit, or group of them."""
        groups = self._groups(candidates)
        return expand(smallest(fuse(candidates, groups)), candidates, groups)

    def _groups(self, candidates: Mapping[str, Sequence[Candidate]]) -> list[list[str]]:
        return groups_of(list(candidates), FUSED_ROLES[self.session.recipe.to])

    def trial(self, choices: Mapping[str, Candidate]) -> Trial:
        """See `Question`."""
        key = tuple(_key(choice) for choice in choices.values())
        if key not in self._measured:
            made = dict(zip(choices, in_order(self._treat, list(choices.values())), strict=True))
            self._measured[key] = self._measure(made)
        return self._measured[key]

    def seconds(self, candidate: Candidate) -> float:
        """See `Question`."""
        one = self._treat(candidate)
        times = []
        for _ in range(TIMED):
            start = time.perf_counter()
            one.transform.decode(one.tensors, one.unit.rows, one.unit.columns)
            times.append(time.perf_counter() - start)
        return min(times)

    def _treat(self, candidate: Candidate) -> Treated:
        key = _key(candidate)
        if key not in self._made:
            unit = self.session.units.named(candidate.unit)
            facts = pricing.facts(self.session, self.statistics, unit, candidate.treatment)
            self._made[key], _ = treat_as_chosen(unit, candidate, facts)
        return self._made[key]

    def _measure(self, made: Mapping[str, Treated]) -> Trial:
        model, divergence = self.session.model, self.session.divergence
        weights = substitutions(made)

        def compare(kept: tuple[Batch, Tensor]) -> tuple[float, float]:
            batch, before = kept
            with torch.no_grad(), substituted(model.module, weights):
                after = predictions_of(model.task.forward(model.module, batch), batch)
            total = [0.0, 0.0]
            for p, q in zip(
                *(torch.split(out, ROWS_AT_ONCE) for out in (before, after)), strict=True
            ):
                for place, part in enumerate(divergence.parts(p, q)):
                    total[place] += float(part.double().sum())
            return total[0], total[1]

        kept = self._original()
        found = list(in_order(compare, kept))
        n = sum(len(outputs) for _, outputs in kept)
        content, quality = (sum(each[place] for each in found) / n for place in (0, 1))
        return Trial(max(0.0, content), max(0.0, quality))

    def _original(self) -> list[tuple[Batch, Tensor]]:
        """Batches of the trials with what the original answers to them."""
        if not self._outputs:
            session, model = self.session, self.session.model
            wanted = SEQUENCES if session.predicts_everywhere else SAMPLES
            for batch in session.data.recovery:
                if wanted <= 0:
                    break
                some = {name: tensor[:wanted] for name, tensor in batch.items()}
                wanted -= len(next(iter(some.values())))
                with torch.no_grad(), one_thread():
                    answers = model.task.forward(model.module, some)
                self._outputs.append((some, predictions_of(answers, some)))
        return self._outputs


def _key(candidate: Candidate) -> Key:
    return candidate.unit, candidate.treatment, repr(sorted(candidate.settings.items()))
