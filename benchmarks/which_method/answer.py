"""The answer of the page: which method to take, and what no metric tells apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from timm_castream.metrics.table import METRICS

from .comparisons import Comparisons
from .values import BASELINES, BOXES, CLASS_FREE, REFERENCE, Result

PLAIN = {'grad_cam': 'Grad-CAM', 'random': 'Random', 'centre': 'Centre'}
FEW = 5  # names in a sentence; more are counted
POINTING, ENERGY = BOXES[:2]


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
        """Methods with a map of their own, without the baselines, Grad-CAM and those whose maps are all constant."""
        result, pooling = self.result, self.pooling
        return [
            m
            for m in result.own_maps(pooling)
            if m not in (REFERENCE, *BASELINES) and not (result.values(pooling, m, 'constant') == 100).all()
        ]

    def verdicts(self, method: str, other: str = REFERENCE) -> list[int]:
        """Of a method, one a question."""
        return self.comparisons.verdicts(self.pooling, method, self.asked, other)

    def verdicts_by_metric(self, method: str) -> dict[str, int]:
        """{first metric of a question: verdict against Grad-CAM}."""
        found = {name: self.comparisons.verdicts(self.pooling, method, [name]) for name in self.asked}
        return {name: verdicts[0] for name, verdicts in found.items() if verdicts}

    def is_better(self, method: str) -> bool:
        """Whether a method is better than Grad-CAM in a question with all tests together, and worse in none by itself."""
        verdicts = self.verdicts(method)
        return bool(verdicts) and max(verdicts) == 2 and min(verdicts) >= 0

    def beside_baselines(self, method: str) -> tuple[int, int]:
        """In how many questions a method is better than both baselines, and in how many worse than one of them."""
        return self.comparisons.beside_baselines(self.pooling, method)

    def is_above_baselines(self, method: str) -> bool:
        won, lost = self.beside_baselines(method)
        return won > lost

    def rivals(self) -> list[str]:
        """Methods that are better than Grad-CAM and beat the baselines more often than they lose to one."""
        return [m for m in self.others() if self.is_better(m) and self.is_above_baselines(m)]


def answer(places: Sequence[Place], boxed: Sequence[Place] = ()) -> Iterable[str]:
    """The first paragraph, and a list of what a reader should know of it.

    Args:
        places: Where questions were asked.
        boxed: Where the metrics of boxes alone were measured.
    """
    winners = [m for m in _names_everywhere(places) if m not in CLASS_FREE and _is_better_everywhere(places, m)]
    yield ' '.join([*_advice(places, winners), *_beside_the_middle(boxed), _one_name(places)])
    yield ''
    weak = [p for p in places if not p.is_above_baselines(REFERENCE)]
    sentences = [*map(_weakness, weak), *_rivals(places, winners), *_untold(places), *_other_names(places)]
    sentences += [*_random_weights(places), *_disagreement(places), *_counts(places), *_beaten_by_centre(places)]
    yield from (f'- {sentence}' for sentence in [*sentences, *map(_on_boxes, boxed)])


def _names_everywhere(places: Sequence[Place]) -> list[str]:
    """Methods that every network measured, under their own name or as the map of another one."""
    known = [set(p.others()) | set(_map_of(p)) for p in places]
    return sorted(set.intersection(*known))


def _map_of(place: Place) -> dict[str, str]:
    return {name: m for m, names in place.result.names_of_one_map(place.pooling).items() for name in names}


def _is_better_everywhere(places: Sequence[Place], name: str) -> bool:
    methods = [_map_of(p).get(name, name) for p in places]
    return all(m != REFERENCE and p.is_better(m) for p, m in zip(places, methods, strict=True))


def _advice(places: Sequence[Place], winners: Sequence[str]) -> Iterable[str]:
    weak = [p for p in places if not p.is_above_baselines(REFERENCE)]
    strong = list(dict.fromkeys(p.result.heading for p in places if p not in weak))
    if winners:
        yield f'**Take {listed(winners)}.**'
    elif strong:
        yield f'**Start with Grad-CAM on {joined(strong)}.** No other method is better on every network.'
    for place in [] if winners else weak:
        yield from _no_advice(place)
    yield '**Show `random` and `centre` beside your method.**'
    counts = [p.result.count(p.pooling, m, n) for p in places for m in p.others() for n in p.asked]
    counts = [count for count in counts if count]
    if counts:
        yield f'Small differences mean nothing here: a value stands on {min(counts)} to {max(counts)} photographs.'


def _no_advice(place: Place) -> Iterable[str]:
    """Where Grad-CAM does not beat the baselines: a method that is better than both, if it reads the class."""
    better = place.rivals()
    reading = [m for m in better if m not in CLASS_FREE]
    count = len(place.asked)
    if reading:
        yield f'**On {place.name} take {listed(reading)}.**'
    else:
        yield f'**On {place.name} no method is recommended.**'
    yield f'Grad-CAM beats both baselines there in {place.beside_baselines(REFERENCE)[0]} of {count} questions.'
    for method in [] if reading else better:
        won = place.beside_baselines(method)[0]
        yield f'{name_of(method)} does in {won} of {count}, but its map is the same for every class.'


def _beside_the_middle(boxed: Sequence[Place]) -> Iterable[str]:
    """Whether Grad-CAM finds the object better than the middle of the image, by Pointing Game."""
    for heading in dict.fromkeys(p.result.heading for p in boxed):
        of_heading = [p for p in boxed if p.result.heading == heading]
        hits = [_hits(p, REFERENCE) for p in of_heading]
        if all(max(p.comparisons.verdicts(p.pooling, REFERENCE, [POINTING], 'centre')) <= 0 for p in of_heading):
            yield (
                f'The highest point of a map of Grad-CAM lies in the box of the object on {joined([f"{hit:.0f} %" for hit in dict.fromkeys(hits)])} '
                f'of the photographs; the middle of the image does on {_hits(of_heading[0], "centre"):.0f} %.'
            )


def _hits(place: Place, method: str) -> float:
    return float(np.nanmean(place.result.values(place.pooling, method, POINTING)))


def _weakness(place: Place) -> str:
    won, lost = place.beside_baselines(REFERENCE)
    above = [m for m in place.others() if place.is_above_baselines(m)]
    undecided = [m for m in ('grad-cam:RandomCAM',) if m in place.others() and not any(place.verdicts(m))]
    return (
        f'On {place.name} Grad-CAM is better than both baselines in {won} of {len(place.asked)} questions, and worse than one '
        f'of them in {lost}, each by its own test. Methods that win there more often than they lose: '
        f'{listed_or_counted(above)}.'
        + (
            f' Random weights of the channels, {listed(undecided)}, are not told apart from Grad-CAM.'
            if undecided
            else ''
        )
    )


def _rivals(places: Sequence[Place], winners: Sequence[str]) -> Iterable[str]:
    rule = 'better than Grad-CAM in a question with all tests together, and worse in none by its own test'
    if not winners:
        yield f'No other method is {rule}, on every network.'
    found = {p.name: p.rivals() for p in places}
    single = [f'{listed_or_counted(methods)} on {name}' for name, methods in found.items() if methods]
    if single:
        yield (
            f'On single networks some are, and beat the baselines more often than they lose to one: {"; ".join(single)}. See '
            '[the table](#against-grad-cam). That a difference is decided does not say that it is large.'
        )


def _everywhere(places: Sequence[Place]) -> tuple[set[str], dict[str, set[str]]]:
    """Names of Grad-CAM's map on every network, and all of them by network."""
    groups = {p.name: set(p.result.names_of_one_map(p.pooling).get(REFERENCE, [])) for p in places}
    return set.intersection(*groups.values()), groups


def _one_name(places: Sequence[Place]) -> str:
    return f'These names have the map of Grad-CAM on all networks: {listed(sorted(_everywhere(places)[0]))}.'


def _other_names(places: Sequence[Place]) -> Iterable[str]:
    everywhere, groups = _everywhere(places)
    extras: dict[tuple[str, ...], list[str]] = {}
    for name, group in groups.items():
        if group - everywhere:
            extras.setdefault(tuple(sorted(group - everywhere)), []).append(name)
    for names, where in extras.items():
        yield f'On {joined(where)} these have its map too: {listed(names)}. See [names of one map](#names-of-one-map).'


def _untold(places: Sequence[Place]) -> Iterable[str]:
    found = {p.name: [m for m in p.others() if len(v := p.verdicts(m)) == len(p.asked) and not any(v)] for p in places}
    parts = [f'{listed_or_counted(methods)} on {name}' for name, methods in found.items() if methods]
    if parts:
        yield (
            f'By the first metric of each question these are not told apart from Grad-CAM, though their maps differ: '
            f'{"; ".join(parts)}. That is no proof that they are equal: so many photographs do not decide.'
        )


def _random_weights(places: Sequence[Place]) -> Iterable[str]:
    """Methods whose maps hardly change where the weights of the network are drawn at random."""
    metric = 'randomisation'
    parts = []
    for place in places:
        means = {
            m: np.nanmean(values)
            for m in place.result.own_maps(place.pooling, slow=False)
            if m not in BASELINES and (values := place.result.values(place.pooling, m, metric))[~np.isnan(values)].size
        }
        blind = [m for m, value in means.items() if value > 50]
        if blind and REFERENCE in means:
            parts.append(f'{listed(blind)} on {place.name} (Grad-CAM: {means[REFERENCE]:.0f} %)')
    if parts:
        yield (
            'With random weights a map should change. The rank correlation with the map of the trained network stays above '
            f'50 % for these: {"; ".join(parts)}.'
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
        f"Metrics disagree: Kendall's tau between the orders of two questions is {min(taus):.2f} to {max(taus):.2f}, in the "
        f'median {np.median(taus):.2f}; that of a question with itself is {np.median(own):.2f} in the median. All are between '
        'two halves of the photographs, see [how far metrics agree](#how-far-metrics-agree).'
    )


def _counts(places: Sequence[Place]) -> Iterable[str]:
    verdicts = [(METRICS[n].symbol, v) for p in places for m in p.others() for n, v in p.verdicts_by_metric(m).items()]
    better = [symbol for symbol, v in verdicts if v == 2]
    split = joined([f'{better.count(symbol)} in {symbol}' for symbol in dict.fromkeys(better)])
    yield (
        f'Of {len(verdicts)} comparisons of another method with Grad-CAM in one question, {sum(v != 0 for _, v in verdicts)} '
        f'are decided by their own test at 5 %; chance would decide about {0.05 * len(verdicts):.0f} if all methods were equal. '
        f'{sum(abs(v) == 2 for _, v in verdicts)} hold with all tests together: '
        f'{sum(v == -2 for _, v in verdicts)} times the other method is worse, {len(better)} times better'
        + (f' ({split}).' if better else '.')
        + ' Poolings are counted apart.'
    )
    beside = {p.name: (*p.beside_baselines(REFERENCE), len(p.asked)) for p in places}
    yield (
        'Grad-CAM is better than both baselines, each by its own test, in '
        + joined([f'{won} of {count} questions on {name}' for name, (won, _, count) in beside.items()])
        + '; worse than one of them in '
        + joined([f'{lost} on {name}' for name, (_, lost, _) in beside.items() if lost])
        + '.'
    )
    counts: dict[str, list[int]] = {}
    slow = []
    for p in places:
        for n in p.asked:
            counts.setdefault(METRICS[n].symbol, []).append(p.result.count(p.pooling, 'random', n))
            slow += [p.result.count(p.pooling, m, n) for m in p.others() if p.result.is_slow(m)]
    ranges = [f'{name} on {_range(count)}' for name, count in counts.items()]
    slow = [count for count in slow if count]
    yield (
        f'How many photographs a question was asked on: {joined(ranges)}.'
        + (f' Methods of many forward passes were asked on {_range(slow)}.' if slow else '')
        + ' Fewer than 6 would decide nothing.'
    )


def _range(counts: Sequence[int]) -> str:
    return f'{min(counts)}' + (f' to {max(counts)}' if max(counts) > min(counts) else '')


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
    """What the metrics of boxes say of Grad-CAM and the baselines, and which methods are better by their own tests."""
    others = [m for m in place.others() if not place.result.is_slow(m)]

    def better(metric: str, other: str) -> str:
        verdicts = {m: place.comparisons.verdicts(place.pooling, m, [metric], other) for m in others}
        return listed_or_counted([m for m, v in verdicts.items() if v and v[0] > 0])

    hits = {m: _hits(place, m) for m in (REFERENCE, *BASELINES)}
    return (
        f'{place.name}: in Pointing Game Grad-CAM hits the box on {hits[REFERENCE]:.0f} % of '
        f'{place.result.count(place.pooling, REFERENCE, POINTING)} photographs, `random` on {hits["random"]:.0f} %, the middle '
        f'of the image on {hits["centre"]:.0f} %. Better than Grad-CAM, each by its own test: {better(POINTING, REFERENCE)} in '
        f'Pointing Game, {better(ENERGY, REFERENCE)} in Energy Pointing Game. Better than the middle: '
        f'{better(POINTING, "centre")} in Pointing Game, {better(ENERGY, "centre")} in Energy Pointing Game.'
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
