"""What a plan has to know of the scores that tokens are chosen by.

They are declared with their weights in the policy room; ``kernels/scores.py`` has the formulas.
"""

from __future__ import annotations

from typing import Literal

from toca_fx.policy import Scores, scores_of

Known = Literal["full", "ahead", "inside"]
Source = Literal["influence", "entropy"]

SCORES = scores_of()
(INSIDE,) = (name for name, score in SCORES.items() if score.known == "inside")
"""The score of a cross-attention's entropy: steps have one place for such a score."""


def weights(scores: Scores, known: Known) -> tuple[tuple[str, float], ...]:
    """The weights other than 0 of the scores that are ``known`` at one moment, by name."""
    named = scores.weights.items()
    return tuple((name, weight) for name, weight in named if SCORES[name].known == known)


def from_source(scores: Scores, source: Source) -> tuple[str, ...]:
    """The names of the scores, of weights other than 0, that are made of one attention."""
    return tuple(name for name in scores.weights if SCORES[name].source == source)
