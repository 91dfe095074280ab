"""Writes docs/which-method.md from the committed values of which_method.py. Every number in it is computed here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau

BASELINES = ('random', 'centre')
BOX_METRICS = ('pointing_game', 'energy_pointing_game', 'localization_error')
NAMES = {
    'imagenet': ('Photographs', 'photographs of Tiny ImageNet'),
    'digits': ('Digits on photographs', 'digits on photographs'),
}
PLAIN = {'grad_cam': 'Grad-CAM', 'random': 'Random', 'centre': 'Centre'}


def write(results: Sequence[Any], path: Path) -> None:
    """Writes the page.

    Args:
        results: Of `which_method.Result`.
        path: The file.
    """
    parts = [
        '# Which method?',
        '',
        '<!-- Written by benchmarks/which_method.py page from benchmarks/which_method_results. Do not edit. -->',
        '',
        _answer(results),
        '',
        *_limits(results),
    ]
    for result in results:
        for pooling in result.facts['poolings']:
            parts += ['', *_table(result, pooling)]
    parts += ['', *_agreement(results), '', *_equal(results), '', *_reading()]
    path.write_text('\n'.join(parts).rstrip() + '\n', encoding='utf-8')


def _answer(results: Sequence[Any]) -> str:
    better, worse, apart, cells = {}, {}, 0, 0
    first = results[0]
    pooling = first.facts['poolings'][0]
    verdicts = first.verdicts(pooling)
    for method, found in verdicts.items():
        if method == 'grad_cam':
            continue
        better[method] = [first.metrics[name]['symbol'] for name, verdict in found.items() if verdict > 0]
        worse[method] = [first.metrics[name]['symbol'] for name, verdict in found.items() if verdict < 0]
        apart += sum(verdict != 0 for verdict in found.values())
        cells += len(found)
    never_worse = [m for m in better if better[m] and not worse[m]]
    unlike = [m for m in better if not better[m] and not worse[m]]
    everywhere = [m for m in never_worse if all(_not_worse(result, m) for result in results)]
    equal = sorted(name for name, other in first.facts['equal'].items() if other == 'grad_cam')
    take = (
        f'On the photographs {_listed(never_worse)} better than Grad-CAM in some metric and worse in none'
        f'{"" if not everywhere else ", and " + _listed(everywhere) + " not worse on the other networks here either"}.'
        if never_worse
        else 'No method is better than Grad-CAM in one metric without being worse in another.'
    )
    dull = [m for m in verdicts if m not in (*BASELINES, 'grad_cam') and _loses_to(first, pooling, m, 'centre')]
    centre = (
        f' A Gaussian in the middle of the image, which knows neither the image nor the network, beats '
        f'{_listed(dull, verb=False)} in at least half of the metrics.'
        if dull
        else ''
    )
    return (
        f'**Take Grad-CAM, and quote no small difference to another method.** It costs one forward and one backward. '
        f'{take} Such leads rest on {first.facts["images"]} images and {cells} comparisons: do not build on them. {len(equal)} other names give the '
        f'map of Grad-CAM on this network, which averages its last map before a linear classifier ({_listed(equal, verb=False)}), so '
        f'no metric can tell them apart. Of {cells} comparisons with Grad-CAM on {first.facts["images"]} photographs '
        f'{apart} have an interval that excludes 0'
        + (f'; {_listed(unlike)} not told apart from Grad-CAM by any metric' if unlike else '')
        + f'.{centre} Metrics disagree with each other more than methods do: see the agreement below before you quote one '
        'of them.'
    )


def _not_worse(result: Any, method: str) -> bool:
    method = result.facts['equal'].get(method, method)
    if method not in result.methods:
        return False
    return all(
        verdict >= 0 for pooling in result.facts['poolings'] for verdict in result.verdicts(pooling)[method].values()
    )


def _loses_to(result: Any, pooling: str, method: str, other: str) -> bool:
    lost = [result.against(pooling, method, metric, other)[2] < 0 for metric in result.metrics]
    return sum(lost) * 2 >= len(lost)


def _limits(results: Sequence[Any]) -> Iterable[str]:
    yield '## What was measured'
    yield ''
    for result in results:
        facts = result.facts
        title, what = NAMES[facts['name']]
        accuracy = ', '.join(f'{pooling.upper()} {value:.1f} %' for pooling, value in facts['accuracy'].items())
        sure = ', '.join(f'{pooling.upper()} {value:.1f} %' for pooling, value in facts['confidence'].items())
        left = facts['left_out']
        yield (
            f'- **{title}**: {facts["network"]}, {facts["images"]} {what} at {facts["side"]} pixels, seed '
            f'{facts["seed"]}. Accuracy {accuracy}; mean probability of the class {sure}. `{facts["command"]}`, '
            f'{facts["machine"]}.'
            + (
                f' Left out, because each takes a forward a channel: {_listed(sorted(left), verb=False)}.'
                if left
                else ''
            )
        )
    versions = results[0].facts['versions']
    yield ''
    yield 'Versions: ' + ', '.join(f'{name} {text}' for name, text in versions.items()) + '.'
    yield ''
    yield (
        'The package index holds no ImageNet weights of a ResNet or of a token network in a small wheel. The second '
        'network is therefore a small ResNet trained on digits, and no token network is measured. The images are '
        'few: an interval that includes 0 says that this many images do not decide, not that two methods are equal.'
    )


def _table(result: Any, pooling: str) -> Iterable[str]:
    facts = result.facts
    metrics = list(result.metrics)
    yield f'## {NAMES[facts["name"]][0]}, {pooling.upper()}'
    yield ''
    yield (
        'Means over the images in percent. **Bold**: better than Grad-CAM, *italic*: worse, where the paired 95 % interval '
        'of the difference excludes 0. Forwards: CPU time of one map in forwards of one image.'
    )
    yield ''
    head = [f'{result.metrics[name]["symbol"]} {"↑" if result.metrics[name]["higher"] else "↓"}' for name in metrics]
    yield '| method | ' + ' | '.join(head) + ' | forwards |'
    yield '| --- |' + ' ---: |' * (len(metrics) + 1)
    verdicts = result.verdicts(pooling)
    order = sorted(result.methods, key=lambda m: (m in BASELINES, -_mean_rank(result, pooling, m)))
    for method in order:
        cells = []
        for metric in metrics:
            text = f'{result.mean(pooling, method, metric):.1f}'
            verdict = verdicts[method][metric]
            cells.append(f'**{text}**' if verdict > 0 else f'*{text}*' if verdict < 0 else text)
        yield f'| {_name(method)} | ' + ' | '.join(cells) + f' | {facts["forwards"][method]:.1f} |'


def _mean_rank(result: Any, pooling: str, method: str) -> float:
    position = result.methods.index(method)
    return float(np.mean([_ranked(result.ranks(pooling, metric))[position] for metric in result.metrics]))


def _ranked(values: np.ndarray) -> np.ndarray:
    return values.argsort().argsort().astype(float)


def _agreement(results: Sequence[Any]) -> Iterable[str]:
    yield '## How far metrics agree'
    yield ''
    yield (
        "Kendall's tau between the orders in which two metrics put the methods: 1 is the same order, 0 is none, -1 is the "
        'reverse. Baselines are among the methods.'
    )
    for result in results:
        for pooling in result.facts['poolings']:
            metrics = list(result.metrics)
            symbols = [result.metrics[name]['symbol'] for name in metrics]
            yield ''
            yield f'### {NAMES[result.facts["name"]][0]}, {pooling.upper()}'
            yield ''
            yield '| | ' + ' | '.join(symbols) + ' |'
            yield '| --- |' + ' ---: |' * len(metrics)
            for first, symbol in zip(metrics, symbols, strict=True):
                taus = [
                    kendalltau(result.ranks(pooling, first), result.ranks(pooling, second)).statistic
                    for second in metrics
                ]
                yield f'| {symbol} | ' + ' | '.join(f'{tau:.2f}' for tau in taus) + ' |'


def _equal(results: Sequence[Any]) -> Iterable[str]:
    yield '## Names of one map'
    yield ''
    yield (
        'Maps that differ by less than 0.01 at every pixel, on every image that was compared, are measured once. On a '
        'network that averages its last map before a linear classifier the gradient of a class is the same at every '
        'location. Grad-CAM, HiResCAM, XGrad-CAM and the plain class activation map are then one formula.'
    )
    for result in results:
        groups: dict[str, list[str]] = {}
        for name, other in result.facts['equal'].items():
            groups.setdefault(other, []).append(name)
        yield ''
        yield f'**{NAMES[result.facts["name"]][0]}**'
        yield ''
        for other, names in groups.items():
            yield f'- {_name(other)}: {", ".join(f"`{name}`" for name in names)}'


def _reading() -> Iterable[str]:
    yield '## How to read it'
    yield ''
    yield (
        '- Many comparisons are made. Among 100 that are all equal in truth, about 5 intervals exclude 0 by chance.\n'
        '- Average Gain and Average Increase reward any map that covers the image: a masked image is more probable when '
        'more of it is left. A method that spreads out wins there and loses Deletion.\n'
        '- The Pointing Game counts one pixel, so a map with one sharp maximum and a bad rest can win it.\n'
        '- The centre is strong wherever objects are in the middle. A method that does not beat it tells nothing about '
        'this network.\n'
        '- Random weights of the channels (`grad-cam:RandomCAM`) still follow the feature maps. Beating `random` is no '
        'achievement; beating `grad-cam:RandomCAM` means that the weights count.\n'
        '- Your network and images may order the methods otherwise: `castream evaluate --methods all` measures them. [Methods by name](methods.md) lists them.'
    )


def _name(method: str) -> str:
    return PLAIN.get(method, f'`{method}`')


def _listed(names: Sequence[str], verb: bool = True) -> str:
    shown = [_name(name) for name in names]
    if not shown:
        return 'none'
    text = shown[0] if len(shown) == 1 else ', '.join(shown[:-1]) + ' and ' + shown[-1]
    return f'{text} {"is" if len(shown) == 1 else "are"}' if verb else text
