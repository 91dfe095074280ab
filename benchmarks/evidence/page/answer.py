"""The question, the answer in three sentences, and advice, made from the differences."""

from __future__ import annotations

from typing import Any

from ..results import Results
from .cells import ARROWS, MASKED, METHODS, STREAMS, listed, signed, size_text, span, symbol, wrap
from .main_table import excess, main_rows
from .record import change_of_recipe

NAMES = {'I ↑': 'Insertion', 'D ↓': 'Deletion'}


def question(settings: dict[str, Any]) -> str:
    """The question and the experiment."""
    return wrap(
        'The paper claims that class activation maps score better under a CA-Stream than under global average pooling '
        '(GAP), at about the same accuracy. Its setting needs eight GPUs. This page asks the question of an experiment '
        f'that two CPU cores can repeat: `{settings["network"]}` with ImageNet weights, frozen; '
        f'{settings["data"]} at {settings["image_size"]} pixels, {settings["train_per_class"]} training images of each '
        'class; differences paired by image, several seeds.'
    )


def answer(results: Results) -> str:
    """The answer in three sentences: Grad-CAM, Grad-CAM under fitted temperatures, Grad-CAM beside random maps."""
    rows = main_rows(results)
    if not rows:
        return 'The main table has not run yet.'
    main = rows[0][2]
    groups: dict[str, list[str]] = {'better': [], 'worse': [], 'no difference seen': []}
    for method, metric, source, difference in rows:
        if method in ('', METHODS['grad_cam']) and metric != 'probability' and difference.verdict in groups:
            size = '' if source is main else f' on {source.num_images} images'
            name = NAMES.get(metric, metric.rstrip(ARROWS))
            groups[difference.verdict].append(f'{name} ({signed(difference.value)}{size})')
    sentences = [
        f'With Grad-CAM ({size_text(main)}), CA is better in {listed(groups["better"])}, worse in '
        f'{listed(groups["worse"])}, and no difference is seen in {listed(groups["no difference seen"])}.'
    ]
    fitted, baselines = results.table('temperatures'), results.table('attention')
    found = {m: fitted.difference('gap_start', f'grad_cam/{m}') for m in MASKED}
    parts = [f'{symbol(m)} {signed(d.value)} ({d.verdict})' for m, d in found.items() if d is not None]
    if parts:
        sentences.append(
            f'Under fitted temperatures, which make both poolings as sure as they are right, the '
            f'differences are {listed(parts)}.'
        )
    gains = {
        m: (baselines.difference('gap_start', f'random/{m}'), excess(main, baselines, 'random', m)) for m in MASKED[1:]
    }
    known = {m: (plain, left) for m, (plain, left) in gains.items() if plain is not None and left is not None}
    if known:
        plain = listed([f'{symbol(m)} {signed(found.value)}' for m, (found, _) in known.items()])
        left = listed([f'{symbol(m)} {signed(found.value)} ({found.verdict})' for m, (_, found) in known.items()])
        sentences.append(f'Random maps change under CA too, by {plain}; what Grad-CAM gains beyond them is {left}.')
    return wrap(' '.join(sentences))


def advice(results: Results) -> str:
    """What a user can take from the tables: a list, or nothing where they have not run."""
    lines = [
        *filter(
            None,
            (start_advice(results), placement_advice(results), augmentation_advice(results), smoothing_advice(results)),
        )
    ]
    if lines:
        lines.append(
            'Report AG and AI with the mean probability, with fitted temperatures and beside random maps. '
            'They depend on the network as much as on the map.'
        )
    return '\n'.join(wrap(f'- {line}').replace('\n', '\n  ') for line in lines)


def start_advice(results: Results) -> str:
    """Which start loses less accuracy, where the intervals do not overlap."""
    gap = results.table('main').difference('gap_start', 'accuracy')
    paper = results.table('initialisation').difference('paper_start', 'accuracy')
    if gap is None or paper is None or gap.low <= paper.high:
        return ''
    return (
        f"Start with `stream_init='gap'`. On so few images its accuracy is {span(gap)} points from that of GAP; "
        f"that of the paper's start is {span(paper)}."
    )


def placement_advice(results: Results) -> str:
    """The stream that loses the least accuracy, with its differences."""
    losses = {}
    for name in ('main', 'placement', 'block', 'class_specific'):
        for kind in results.table(name).streams:
            difference = results.table(name).difference(kind, 'accuracy')
            if difference is not None:
                losses[name, kind] = difference.value
    if len(losses) < 2:
        return ''
    name, kind = max(losses, key=lambda pair: losses[pair])
    values = results.table(name)
    found = {'accuracy': values.difference(kind, 'accuracy')}
    found |= {symbol(m): values.difference(kind, f'grad_cam/{m}') for m in MASKED}
    figures = [f'{title} {span(d)} ({d.verdict})' for title, d in found.items() if d is not None]
    return f'Of these streams {STREAMS[kind]} loses the least accuracy: {listed(figures)}.'


def augmentation_advice(results: Results) -> str:
    """What timm's augmentation did through `castream train`, where AG rose without it and not with it."""
    if not {'product', 'augmentation'} <= results.settings['tables'].keys():
        return ''
    tables = [results.table(name) for name in ('product', 'augmentation')]
    without, with_it = ([table.difference('gap_start', f'grad_cam/{m}') for m in MASKED[1:]] for table in tables)
    if None in (*without, *with_it) or without[0].verdict != 'better' or with_it[0].verdict == 'better':
        return ''
    figures = [
        listed([f'{symbol(m)} {span(d)}' for m, d in zip(MASKED[1:], row, strict=True)]) for row in (without, with_it)
    ]
    return (
        f'Train on plain images. Through `castream train` CA - GAP of Grad-CAM is {figures[0]}; with the random '
        f'crops and flips of timm and as many epochs it is {figures[1]}.'
    )


def smoothing_advice(results: Results) -> str:
    """What label smoothing did, where AG and AI fell with it."""
    change = change_of_recipe(results.choices.get('gap_start', {}), 'label_smoothing')
    if not change or change['AG'] >= 0 or change['AI'] >= 0:
        return ''
    return (
        f'Train without label smoothing. With it AG changed by {signed(change["AG"])} and AI by '
        f'{signed(change["AI"])} on the selection images.'
    )
