"""What `attar.explain` gives back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attar import pipeline
from attar.records import Scores, Statistics
from attar.session import Session


class Explanation(Mapping[str, Scores]):
    """Scores by criterion, with the statistics they came from."""

    def __init__(self, session: Session, statistics: Statistics) -> None:
        self.session = session
        self.statistics = statistics
        self._scores = pipeline.score_all(session, statistics)

    def __getitem__(self, criterion: str) -> Scores:
        return self._scores[criterion]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)
