"""Accuracy of a stream against the number of training images, for several starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .choice import recipe_of
from .setup import Setup


def run_growth(setup: Setup, streams: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> None:
    """Trains every stream of `growth` in the settings; each ends as `streams/NAME.json`, with its accuracies.

    With fewer images an epoch has fewer steps; the number of epochs grows to keep the number of steps.

    Args:
        setup: The run.
        streams, seeds: Only these. None: those of the settings.
    """
    growth = setup.settings['growth']
    for seed in seeds or growth['seeds']:
        for kind in streams or growth['streams']:
            for per_class in growth['per_class']:
                setup.stream(
                    kind,
                    seed,
                    recipe(setup, kind, per_class),
                    name(setup, kind, seed, per_class),
                    None if is_all(setup, per_class) else per_class,
                )


def name(setup: Setup, kind: str, seed: int, per_class: int) -> str:
    """Name of the stream's files; streams on all images are those of the tables."""
    return f'{kind}-{seed}' + ('' if is_all(setup, per_class) else f'-{per_class}')


def recipe(setup: Setup, kind: str, per_class: int) -> dict[str, Any]:
    """The settings chosen for all images, with the same number of steps."""
    chosen = recipe_of(setup, kind)
    return chosen | {'epochs': round(chosen['epochs'] * setup.settings['train_per_class'] / per_class)}


def is_all(setup: Setup, per_class: int) -> bool:
    """Whether these are all training images."""
    return per_class == setup.settings['train_per_class']
