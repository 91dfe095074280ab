"""The answer of the page: which method to take, and what no metric tells apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from timm_castream.metrics.table import METRICS

from .comparisons import Comparisons
from .values import BASELINES, CLASS_FREE, REFERENCE, Result

PLAIN = {'grad_cam': 'Grad-CAM', 'random': 'Random', 'centre': 'Centre'}
FEW = 4  # names in a sentence; more are counted


class Place(NamedTuple):
    """A network under a pooling, with its comparisons."""

    result: Result
    comparisons: Comparisons
    pooling: str

    @property
    def name(self) -> str:
        return self.result.place(self.pooling)

    @property
    def asked(self) -> list[str]:
        return self.result.asked(self.pooling)

    def others(self) -> list[str]:
        """Methods with a map of their own, without the baselines and Grad-CAM."""
        return [m for m in self.result.own_maps(self.pooling) if m not in (REFERENCE, *BASELINES)]

    def verdicts(self, method: str, other: str = REFERENCE) -> list[int]:
        """Of a method, one a question."""
        return self.comparisons.verdicts(self.pooling, method, self.asked, other)

    def is_better(self, method: str) -> bool:
        """Whether a method is better than Grad-CAM in a question by all tests at once, and worse in none by itself."""
        verdicts = self.verdicts(method)
        return bool(verdicts) and max(verdicts) == 2 and min(verdicts) >= 0

    def beside_baselines(self, method: str) -> tuple[int, int]:
        """In how many questions a method is better than both baselines, and in how many worse than one of them."""
        return self.comparisons.beside_baselines(self.pooling, method)

    def is_above_baselines(self, method: str) -> bool:
        won, lost = self.beside_baselines(method)
        return won > lost


def answer(places: Sequence[Place], boxed: Sequence[Place] = ()) -> Iterable[str]:
    """The first paragraph, and a list of what a reader should know of it.

    Args:
        places: Where questions were asked.
        boxed: Where the metrics of boxes alone were measured.
    """
    winners = [name for name in _names_everywhere(places) if _is_better_everywhere(places, name)]
    costs = [p.result.facts['seconds'][REFERENCE] / p.result.facts['forward_seconds'] for p in places]
    yield ' '.join(
        [
            f'**{_advice(places, winners)} Publish `random` and `centre` beside your method, and claim no small difference to '
            'another one.**',
            f'A map of Grad-CAM costs at most as much as {max(costs):.1f} forward passes of one image.',
            *_equal_names(places),
        ]
    )
    yield ''
    weak = [p for p in places if not p.is_above_baselines(REFERENCE)]
    sentences = [*(_weakness(p) for p in weak), *_rivals(places, winners), *_untold(places), *_disagreement(places)]
    sentences += [*_counts(places), *_beaten_by_centre(places), *map(_on_boxes, boxed)]
    yield from (f'- {sentence}' for sentence in sentences)


def _names_everywhere(places: Sequence[Place]) -> list[str]:
    """Methods that every network measured, under their own name or as the map of another one."""
    known = [set(p.others()) | set(_map_of(p)) for p in places]
    return sorted(set.intersection(*known))


def _map_of(place: Place) -> dict[str, str]:
    return {name: m for m, names in place.result.names_of_one_map(place.pooling).items() for name in names}


def _is_better_everywhere(places: Sequence[Place], name: str) -> bool:
    methods = [_map_of(p).get(name, name) for p in places]
    return all(m != REFERENCE and p.is_better(m) for p, m in zip(places, methods, strict=True))


def _advice(places: Sequence[Place], winners: Sequence[str]) -> str:
    weak = [p for p in places if not p.is_above_baselines(REFERENCE)]
    if winners or not weak:
        return f'Take {listed(winners or [REFERENCE])}.'
    strong = list(dict.fromkeys(p.result.heading for p in places if p not in weak))
    words = [f'Take Grad-CAM on networks such as {joined(strong)}.'] if strong else []
    for place in weak:
        above = [m for m in place.others() if place.is_above_baselines(m)]
        better = [m for m in above if place.is_better(m)]
        if better:
            words.append(f'On {place.name} take {listed(better)} before it.')
        elif above:
            words.append(
                f'On {place.name} take none on trust: Grad-CAM does not beat the baselines, and what does, {listed(above)}, is '
                'not shown to be better than Grad-CAM without being worse in another question.'
            )
        else:
            words.append(f'On {place.name} no map is shown to be better than a Gaussian in the middle.')
    return ' '.join(words)


def _weakness(place: Place) -> str:
    won, lost = place.beside_baselines(REFERENCE)
    above = [m for m in place.others() if place.is_above_baselines(m)]
    free = [m for m in above if m in CLASS_FREE]
    return (
        f'On {place.name} Grad-CAM is better than both baselines in {won} of {len(place.asked)} questions and worse than one '
        f'in {lost}. More often better than both than worse than one there: {listed_or_counted(above)}.'
        + (f' The class is not read by {listed(free)}.' if free else '')
    )


def _rivals(places: Sequence[Place], winners: Sequence[str]) -> Iterable[str]:
    if not winners:
        yield 'No other method is better than Grad-CAM in a question and worse in none on every network.'
    found = {p.name: [m for m in p.others() if p.is_better(m)] for p in places}
    single = [f'{listed_or_counted(methods)} on {name}' for name, methods in found.items() if methods]
    if single:
        yield f'On single networks some are, see [the table](#against-grad-cam): {"; ".join(single)}.'


def _equal_names(places: Sequence[Place]) -> Iterable[str]:
    groups = {p.name: set(p.result.names_of_one_map(p.pooling).get(REFERENCE, [])) for p in places}
    everywhere = set.intersection(*groups.values())
    yield f'No metric can tell {listed(sorted(everywhere))} apart from Grad-CAM: their maps are equal on all networks, see [names of one map](#names-of-one-map).'
    extras: dict[tuple[str, ...], list[str]] = {}
    for name, group in groups.items():
        if group - everywhere:
            extras.setdefault(tuple(sorted(group - everywhere)), []).append(name)
    for names, where in extras.items():
        yield f'On {joined(where)} the same holds of {listed(names)}.'


def _untold(places: Sequence[Place]) -> Iterable[str]:
    found = {p.name: [m for m in p.others() if len(v := p.verdicts(m)) == len(p.asked) and not any(v)] for p in places}
    parts = [f'{listed_or_counted(methods)} on {name}' for name, methods in found.items() if methods]
    if parts:
        yield (
            f'No question tells these apart from Grad-CAM, though their maps differ: {"; ".join(parts)}. That is no proof that '
            'they are equal: so many photographs do not decide.'
        )


def _disagreement(places: Sequence[Place]) -> Iterable[str]:
    taus = [
        p.comparisons.tau(p.pooling, one, other)
        for p in places
        for position, one in enumerate(p.asked)
        for other in p.asked[:position]
    ]
    if not taus:
        return
    own = [p.comparisons.tau(p.pooling, name, name) for p in places for name in p.asked]
    yield (
        f"Metrics disagree: Kendall's tau between the orders that two questions give is {min(taus):.2f} to {max(taus):.2f}, in "
        f'the median {np.median(taus):.2f}; in the median a question agrees with itself, between two halves of its photographs, '
        f'by {np.median(own):.2f}, see [how far metrics agree](#how-far-metrics-agree).'
    )


def _counts(places: Sequence[Place]) -> Iterable[str]:
    verdicts = [v for p in places for m in p.others() for v in p.verdicts(m)]
    yield (
        f'Of {len(verdicts)} comparisons of another method with Grad-CAM in one question, {sum(v != 0 for v in verdicts)} '
        f'are decided by their own test at 5 %, where chance would decide at most about {0.05 * len(verdicts):.0f} if all were equal. '
        f'{sum(abs(v) == 2 for v in verdicts)} hold with all tests of a network taken together: '
        f'{sum(v == -2 for v in verdicts)} times the other method is worse, {sum(v == 2 for v in verdicts)} times better.'
    )
    beside = {p.name: (*p.beside_baselines(REFERENCE), len(p.asked)) for p in places}
    yield (
        'Grad-CAM is better than both baselines in '
        + joined([f'{won} of {count} questions on {name}' for name, (won, _, count) in beside.items()])
        + '; worse than one of them in '
        + joined([f'{lost} on {name}' for name, (_, lost, _) in beside.items() if lost])
        + '.'
    )
    counts = {METRICS[n].symbol: [] for p in places for n in p.asked}
    for p in places:
        for n in p.asked:
            counts[METRICS[n].symbol].append(p.result.count(p.pooling, 'random', n))
    ranges = [f'{name} on {min(c)}' + (f' to {max(c)}' if max(c) > min(c) else '') for name, c in counts.items()]
    yield f'How many photographs a question was asked on: {joined(ranges)}. Fewer than 6 decide nothing.'


def _beaten_by_centre(places: Sequence[Place]) -> Iterable[str]:
    beaten = [
        {m for m in p.others() if (v := p.verdicts(m, 'centre')) and 2 * sum(x < 0 for x in v) >= len(v)}
        for p in places
    ]
    always = sorted(set.intersection(*beaten))
    if always:
        yield (
            'A Gaussian in the middle of the image, which knows neither the image nor the network, is better than '
            f'{listed(always)} in at least half of the questions on every network.'
        )


def _on_boxes(place: Place) -> str:
    """What Pointing Game says of Grad-CAM and the baselines, and which methods are better."""
    metric = 'pointing_game'
    shares = {m: np.nanmean(place.result.values(place.pooling, m, metric)) for m in (REFERENCE, *BASELINES)}
    others = [m for m in place.others() if not place.result.is_slow(m)]
    better = [m for m in others if max(place.comparisons.verdicts(place.pooling, m, [metric]), default=0) == 2]
    above = [m for m in others if max(place.comparisons.verdicts(place.pooling, m, [metric], 'centre'), default=0) > 0]
    return (
        f'{place.name}: the highest point of the map of Grad-CAM lies in the box of the object on {shares[REFERENCE]:.0f} % of '
        f'{place.result.count(place.pooling, REFERENCE, metric)} photographs, that of `random` on {shares["random"]:.0f} %, the '
        f'middle of the image on {shares["centre"]:.0f} %. Better than Grad-CAM with all tests taken together: '
        f'{listed_or_counted(better)}. Better than the middle by a test of their own: {listed_or_counted(above)}.'
    )


def name_of(method: str) -> str:
    return PLAIN.get(method, f'`{method}`')


def joined(texts: Sequence[str]) -> str:
    if not texts:
        return 'none'
    return texts[0] if len(texts) == 1 else ', '.join(texts[:-1]) + ' and ' + texts[-1]


def listed(names: Sequence[str]) -> str:
    return joined([name_of(name) for name in names])


def listed_or_counted(names: Sequence[str]) -> str:
    return listed(names) if len(names) <= FEW else f'{len(names)} methods'
