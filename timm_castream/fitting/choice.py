"""The settings that are tried, and the rule that takes one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from .training import Recipe

EPOCHS = (1, 3)
RATES = {'gap': (3e-5, 1e-4), 'paper': (3e-4, 1e-3)}
MARGINS = {'folders': 1.0, 'predicted': 5.0}
"""Points that CA may be less accurate than GAP on the images held out. Where GAP's own predictions are the labels, its
accuracy is 100 %, and every change of a prediction counts against the stream, also one for the better."""
SCORE_MARGIN = 1.0
MAX_SCORED = 200


@dataclass(frozen=True)
class Tried:
    """What was measured of one recipe on the images held out for the choice, in percent.

    Attributes:
        recipe: The settings.
        accuracy: Accuracy of CA.
        average_gain: AG of Grad-CAM minus that of random maps, None if the accuracy leaves the recipe out.
        average_increase: AI of Grad-CAM minus that of random maps, or None.
    """

    recipe: Recipe
    accuracy: float
    average_gain: float | None = None
    average_increase: float | None = None

    def __str__(self) -> str:
        score = '' if self.average_gain is None else f', AG {self.average_gain:.1f}, AI {self.average_increase:.1f}'
        return f'{self.recipe}: accuracy {self.accuracy:.1f}{score}'

    @property
    def score(self) -> float:
        """AG + AI."""
        return (self.average_gain or 0.0) + (self.average_increase or 0.0)


def recipes(
    last_stage: int,
    init: str,
    epochs: Sequence[int] = (),
    lr: Sequence[float] = (),
    stream_start: Sequence[int] = (),
    weight_decay: float = 0.0,
) -> list[Recipe]:
    """The settings to try: every combination of placements, epochs and rates.

    Args:
        last_stage: L.
        init: `stream_init`.
        epochs, lr, stream_start: Given values. Without any: the placements S_0 - S_L and S_L - S_L, one epoch and
            three, and two rates.
        weight_decay: AdamW's.
    """
    return [
        Recipe(placement, length, rate, weight_decay)
        for placement, length, rate in product(
            dict.fromkeys(stream_start or (0, last_stage)),
            dict.fromkeys(epochs or EPOCHS),
            dict.fromkeys(lr or RATES[init]),
        )
    ]


def accurate(tried: Sequence[Tried], least: float) -> list[Tried]:
    """Those with an accuracy of at least `least`, or else the most accurate ones."""
    least = min(least, max(entry.accuracy for entry in tried))
    return [entry for entry in tried if entry.accuracy >= least]


def take(tried: Sequence[Tried], least: float) -> Tried:
    """The recipe that the rule takes.

    1. Recipes less accurate than `least` are left out. Where none is left, the most accurate ones stay.
    2. Of the others the one with the greatest score, AG + AI of Grad-CAM minus those of random maps, is chosen.
    3. Scores within one point of the greatest cannot be told apart. Of these the most accurate recipe is taken, and of
       equally accurate ones the one with the fewest epochs.

    Args:
        tried: What was measured.
        least: In percent.
    """
    fair = accurate(tried, least)
    best = max(entry.score for entry in fair)
    equal = [entry for entry in fair if entry.score >= best - SCORE_MARGIN]
    return min(equal, key=lambda entry: (-entry.accuracy, entry.recipe.epochs, entry.recipe.lr))
