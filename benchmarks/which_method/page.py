"""Writes docs/which-method.md from the committed values. Every number in it is computed here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from timm_castream.metrics.table import METRICS

from .answer import Place, answer, joined, listed, name_of
from .comparisons import EXACT, FLIPS, FLIPS_ALONE, HALVES, Comparisons
from .values import BASELINES, BOXES, CLASS_FREE, EQUAL, MAP_CHECKS, QUESTIONS, REFERENCE, REPEATS, SAME_VALUES, Result

TABLES = {
    'Masks': QUESTIONS['Masked image'] + QUESTIONS['Top half'],
    'Curves and ROAD': tuple(name for names in list(QUESTIONS.values())[2:] for name in names),
    'The map itself': MAP_CHECKS,
    'Boxes': BOXES,
}


def write(results: Sequence[Result], path: Path) -> None:
    """Writes the page."""
    path.write_text('\n'.join(render(results)).rstrip() + '\n', encoding='utf-8')


def render(results: Sequence[Result]) -> Iterable[str]:
    """The lines of the page."""
    places = [
        Place(result, comparisons, p)
        for result in results
        for comparisons in [Comparisons(result)]
        for p in result.poolings
    ]
    boxed = [place for place in places if not place.asked]
    places = [place for place in places if place.asked]
    questioned = list({id(place.result): place.result for place in places}.values())
    yield '# Which method?'
    yield ''
    yield '<!-- Written by python -m benchmarks.which_method page from benchmarks/which_method_results. Do not edit. -->'
    yield ''
    for part in (
        answer(places, boxed),
        _overview(places),
        _measured(results),
        _reading(),
        *(_section(place) for place in [*places, *boxed]),
        _agreement(places),
        _one_map(places),
        _costs(questioned),
        _limits(results),
    ):
        yield from part
        yield ''


def _overview(places: Sequence[Place]) -> Iterable[str]:
    yield '## Against Grad-CAM'
    yield ''
    yield (
        'In how many questions a method is better (+) and worse (-) than Grad-CAM, each test by itself at 5 %; in brackets, '
        'where the same holds with all tests together. The first metric of a question speaks for it. The questions are '
        + joined([f'*{title}*' for title in QUESTIONS])
        + '. Where a method has fewer than all of them, their number follows. *=*: the map is that of Grad-CAM. Methods that '
        'every network has stand above those that some lack; among them the order is that of the share of questions won less '
        'the share lost, the mean over the networks.'
    )
    yield ''
    yield '| method | ' + ' | '.join(f'{p.name} ({len(p.asked)})' for p in places) + ' |'
    yield '| --- |' + ' --- |' * len(places)
    names = list(dict.fromkeys(m for p in places for m in p.others()))
    for name in [*sorted(names, key=lambda m: (_lacks(places, m), -_balance(places, m), m)), *BASELINES]:
        yield f'| {name_of(name)} | ' + ' | '.join(_score(p, name) for p in places) + ' |'


def _method_of(place: Place, name: str) -> str:
    """The method whose map a name has at a place."""
    groups = place.result.names_of_one_map(place.pooling)
    return next((method for method, others in groups.items() if name in others), name)


def _lacks(places: Sequence[Place], name: str) -> bool:
    return any(m != REFERENCE and not p.verdicts(m) for p in places for m in [_method_of(p, name)])


def _balance(places: Sequence[Place], name: str) -> float:
    means = [np.sign(v).mean() for p in places if (v := p.verdicts(_method_of(p, name)))]
    return float(np.mean(means)) if means else 0.0


def _score(place: Place, name: str) -> str:
    method = _method_of(place, name)
    if method == REFERENCE:
        return '='
    verdicts = np.array(place.verdicts(method))
    if not len(verdicts):
        return ''
    text = f'+{(verdicts > 0).sum()} -{(verdicts < 0).sum()} (+{(verdicts == 2).sum()} -{(verdicts == -2).sum()})'
    return text + (f' of {len(verdicts)}' if len(verdicts) < len(place.asked) else '')


def _measured(results: Sequence[Result]) -> Iterable[str]:
    yield '## What was measured'
    yield ''
    for result in results:
        facts = result.facts
        accuracy = joined([f'{facts["accuracy"][p]:.1f} % ({p.upper()})' for p in result.poolings])
        sure = joined([f'{facts["confidence"][p]:.1f} % ({p.upper()})' for p in result.poolings])
        yield (
            f'- **{result.heading}**: {facts["network"]}. {result.num_images} {facts["photographs"]} {facts["side"]} x '
            f'{facts["side"]} pixels, drawn with seed {facts["seed"]}. The network names the class of {accuracy} of them; the mean '
            f'probability of the class is {sure}. ' + ', '.join(f'`{command}`' for command in facts['commands']) + '.'
        )
    yield ''
    yield (
        'The photographs are those named as validation photographs of ImageNet in the folders `val` of Imagenette and '
        'Imagewoof. The ResNet and the classifier of the ViT know the folders `train` alone. The backbone of '
        'EfficientNet-Lite0 was trained by its authors on training photographs of ImageNet; the fit of its stream left out '
        'copies of the folders `val` ([Networks with a stream](pretrained.md)). What the other weights have seen is known '
        'from their authors alone. Boxes are known of other photographs, those of Tiny ImageNet; on them only the metrics of boxes '
        'are measured.'
    )
    yield ''
    left = sorted({name for result in results for name in result.facts['left_out']})
    yield (
        'The class explained is the label, also where the network predicts another one; right predictions are not shown apart. '
        'Photographs were added after earlier values had been seen, and the advice for a network can change with them. Every '
        'method has the settings that its name has in `castream evaluate`; others may do better. *n* in a table is the number '
        f'of photographs. Left out: {listed(left)}, which are Score-CAM again; `grad-cam:SESS`, `torchcam:SSCAM` and '
        '`torchcam:ISCAM`, which take more than ten forward passes for each channel or a hundred for a map; and methods that '
        '[do not run](methods.md) on a network.'
    )
    known = {name for result in results for name in result.facts['metrics']}
    missing = [row.title for name, row in METRICS.items() if name not in known]
    if missing:
        yield ''
        yield (
            f'Not measured: {joined(missing)}.'
            + (' MaxBoxAccV2 has no value of a single photograph.' if 'MaxBoxAccV2' in missing else '')
        )
    partly = {
        result.heading: [METRICS[n].title for n in METRICS if n in known - {*BOXES, *result.facts['metrics']}]
        for result in results
        if result.asked(result.poolings[0])
    }
    for heading, titles in partly.items():
        if titles:
            yield ''
            yield f'Not measured on {heading}: {joined(titles)}.'
    yield ''
    versions = results[0].facts['versions']
    yield 'Versions: ' + ', '.join(f'{name} {text}' for name, text in versions.items()) + '.'


def _reading() -> Iterable[str]:
    yield '## How to read the tables'
    yield ''
    yield (
        '- Values are means over the photographs in percent; arrows point to better values, and the [protocol](protocol.md) '
        'defines them.\n'
        '- **Bold**: better than Grad-CAM, *italic*: worse, by a test of the paired differences at 5 % that flips the signs of '
        f'whole photographs: all flips of up to {EXACT} photographs, {FLIPS_ALONE:,} of more. It holds for any number of '
        'photographs if the differences of two equal methods are symmetric about 0. Many tests are made: among 100 pairs of '
        'equal methods about 5 are decided by chance. An asterisk marks what holds *with all tests together*: those of the '
        'quick methods of a network in all metrics and under both poolings, or those of its methods of many forward passes. '
        f'The largest score of each of {FLIPS:,} flips is their bound.\n'
        '- Complexity is not tested, nor are the baselines in the tables of methods of many forward passes.\n'
        '- Any other cell without a mark says that so many photographs do not decide, not that two methods are equal. Fewer than 6 never '
        'decide: one in 16 of the flips of 5 signs is as clear as any result. *Seen from*: half '
        'of the width of the 95 % interval of a difference (Student), the median over the methods. A smaller difference is '
        'mostly not seen.\n'
        '- The metrics of one question share images or differ in a detail, so that they agree by construction: '
        + '; '.join(
            f'*{title}* ({", ".join(METRICS[n].symbol for n in names)})'
            for title, names in QUESTIONS.items()
            if len(names) > 1
        )
        + '. The first speaks for the question wherever questions are counted.\n'
        '- The metrics of the map itself ask the network nothing, or mix what it says with the shape of the map. A map that is '
        'the same for all images, as the centre, is coherent and stable without merit. They are compared and not counted.\n'
        '- The metrics of boxes ask whether the map lies on the object that people marked, not whether the network uses it. '
        'They are compared and not counted.\n'
        '- Order of the rows in every table of a network: the mean place over the first metrics of all questions, the best on '
        'top; baselines stand last. Neighbours need not differ.\n'
        '- *Blank*: share of the maps that are constant, which say nothing.\n'
        '- A method whose map is that of an earlier one stands in [names of one map](#names-of-one-map) and not in a table.'
    )


def _section(place: Place) -> Iterable[str]:
    yield f'## {place.name}'
    for title, names in TABLES.items():
        yield from _table(place, title, names, slow=False)
    asked = [name for names in list(TABLES.values())[:2] for name in names]
    yield from _table(place, 'Methods of many forward passes', asked, slow=True)


def _table(place: Place, title: str, names: Sequence[str], slow: bool) -> Iterable[str]:
    result, pooling = place.result, place.pooling
    measured = result.own_maps(pooling, slow)
    metrics = [
        n for n in result.metrics_of(pooling) if n in names and any(result.count(pooling, m, n) for m in measured)
    ]
    if not metrics:
        return
    methods = [*measured, REFERENCE, *BASELINES] if slow else measured
    ranks = place.comparisons.mean_places(pooling, methods)
    photographs = {n: result.photographs(pooling, measured, n) for n in metrics}
    yield ''
    yield f'### {title}: {place.name}'
    yield ''
    yield '| method | ' + ' | '.join(METRICS[n].heading for n in metrics) + ' | blank |'
    yield '| --- |' + ' ---: |' * (len(metrics) + 1)
    yield '| *n* | ' + ' | '.join(str(photographs[n].sum()) for n in metrics) + ' | |'
    for method in sorted(methods, key=lambda m: (m in BASELINES, ranks[m])):
        cells = [_cell(place, method, n, photographs[n], marked=method in measured) for n in metrics]
        blank = np.nanmean(result.values(pooling, method, 'constant')[photographs[metrics[0]]])
        yield f'| {name_of(method)} | ' + ' | '.join(cells) + f' | {100 * blank:.0f} % |'
    others = [m for m in measured if m not in (REFERENCE, *BASELINES)]
    yield '| *seen from* | ' + ' | '.join(_seen_from(place, n, others) for n in metrics) + ' | |'


def _cell(place: Place, method: str, metric: str, photographs: np.ndarray, marked: bool) -> str:
    values = place.result.values(place.pooling, method, metric)[photographs]
    count = int((~np.isnan(values)).sum())
    if not count:
        return ''
    verdict = place.comparisons.against_reference.get((place.pooling, method, metric), (0, 0.0))[0] if marked else 0
    mark = '**' if verdict > 0 else '*' if verdict < 0 else ''
    star = '\\*' if abs(verdict) == 2 else ''
    return f'{mark}{np.nanmean(values):.1f}{mark}{star}' + (f' ({count})' if count < photographs.sum() else '')


def _seen_from(place: Place, metric: str, methods: Sequence[str]) -> str:
    table = place.comparisons.against_reference
    widths = [table[place.pooling, m, metric][1] for m in methods if (place.pooling, m, metric) in table]
    return f'{np.median(widths):.1f}' if widths and np.median(widths) else ''  # 0: most maps have equal values


def _agreement(places: Sequence[Place]) -> Iterable[str]:
    yield '## How far metrics agree'
    yield ''
    yield (
        "Kendall's tau between the orders in which two metrics put the methods: 1 is the same order, 0 is none, -1 is the "
        'reverse. One order is of one half of the photographs that both metrics have, the other one of the other half: the mean '
        f'over {HALVES:,} random halves. Baselines and methods of many forward passes are not among the methods. In *italics*: a '
        'metric with itself. Where that is low, the photographs are too few to say how far the metric agrees with another one.'
    )
    for place in places:
        yield from _taus(place)


def _taus(place: Place) -> Iterable[str]:
    pooling, comparisons = place.pooling, place.comparisons
    measured = place.result.metrics_of(pooling)
    metrics = [n for n in (*place.asked, *MAP_CHECKS) if n in measured]
    yield ''
    yield f'### Agreement: {place.name}, {len(comparisons.ordered_methods(pooling))} methods'
    yield ''
    yield '| | ' + ' | '.join(METRICS[n].symbol for n in metrics) + ' |'
    yield '| --- |' + ' ---: |' * len(metrics)
    for row, name in enumerate(metrics):
        cells = [f'{comparisons.tau(pooling, name, other):.2f}' for other in metrics[:row]]
        cells += [f'*{comparisons.tau(pooling, name, name):.2f}*'] + [''] * (len(metrics) - row - 1)
        yield f'| {METRICS[name].symbol} | ' + ' | '.join(cells) + ' |'
    pairs = [
        f'{METRICS[one].symbol} and {METRICS[other].symbol} {comparisons.tau(pooling, one, other):.2f}'
        for names in QUESTIONS.values()
        for one, other in combinations([n for n in names if n in measured], 2)
    ]
    if pairs:
        yield ''
        yield f'Within a question: {", ".join(pairs)}.'


def _one_map(places: Sequence[Place]) -> Iterable[str]:
    yield '## Names of one map'
    yield ''
    yield (
        f'Maps that differ by less than {EQUAL} at every pixel, under every pooling, on the {places[0].result.facts["probed"]} '
        f'photographs that were compared, were measured once. Methods whose values differ by less than {SAME_VALUES} on every '
        'photograph and in every metric are joined under that pooling. On a network that averages its last map before a linear '
        'classifier the gradient of a class is the same at every location: Grad-CAM, HiResCAM and XGrad-CAM are '
        'then one formula, the class activation map cut at 0. `torchcam:CAM` does not cut it, so that its map covers more.'
    )
    for place in places:
        yield ''
        yield f'**{place.name}**'
        yield ''
        groups = place.result.names_of_one_map(place.pooling)
        yield from (f'- {name_of(name)}: {listed(others)}' for name, others in groups.items())
    for result in {id(p.result): p.result for p in places}.values():
        if result.same_metrics:
            yield ''
            yield ' '.join(
                f'On {result.heading} {METRICS[name].symbol} has the values of {METRICS[other].symbol}.'
                for name, other in result.same_metrics.items()
            )


def _costs(results: Sequence[Result]) -> Iterable[str]:
    yield '## What a map costs'
    yield ''
    forwards = joined([f'{1000 * r.facts["forward_seconds"]:.0f} ms on {r.heading}' for r in results])
    yield (
        f'Seconds of CPU time an image, and in brackets in forward passes of an image, which take {forwards} '
        f'({results[0].facts["machine"]}, `python -m benchmarks.which_method time`). Both are of {results[0].facts["probed"]} '
        f'images at once where the library allows it; the median of {REPEATS} calls after one that is not counted, of methods of '
        'many forward passes one call.'
    )
    yield ''
    yield '| method | ' + ' | '.join(r.heading for r in results) + ' |'
    yield '| --- |' + ' ---: |' * len(results)
    for name in dict.fromkeys(name for r in results for name in r.facts['seconds']):
        cells = [
            f'{seconds:.3g} ({seconds / r.facts["forward_seconds"]:.1f})'
            if (seconds := r.facts['seconds'].get(name)) is not None
            else ''
            for r in results
        ]
        yield f'| {name_of(name)} | ' + ' | '.join(cells) + ' |'


def _limits(results: Sequence[Result]) -> Iterable[str]:
    yield '## What this page does not show'
    yield ''
    yield (
        '- Which map is true. No metric here knows what a network looks at; each asks how a probability changes on images '
        'that no camera takes.\n'
        '- Average Drop, Gain and Increase reward any map that covers the image: a masked image is more probable when more of '
        'it is left. Complexity rewards the opposite, and a map of one pixel has the best value.\n'
        '- The centre is strong wherever objects are in the middle. A method that does not beat it is not shown to tell '
        'anything about this network.\n'
        f'- Why this class. {listed([m for m in CLASS_FREE if m not in BASELINES])} do not read the class: they show what '
        'stands out.\n'
        '- Random weights of the channels (`grad-cam:RandomCAM`) still follow the feature maps. Beating `random` is no '
        'achievement; beating `grad-cam:RandomCAM` means that the weights count.\n'
        '- Whether CA is better than GAP. The stream of EfficientNet-Lite0 was fitted to training photographs of these 20 '
        'classes, among others; [Networks with a stream](pretrained.md) compares the poolings.\n'
        '- What holds for large networks, large images and other kinds of photographs. These networks are small, see few pixels '
        'and err often; the photographs are of 10 or 20 classes of ImageNet.\n'
        '- Your network and images may order the methods otherwise: `castream evaluate --methods all` measures them.'
    )
