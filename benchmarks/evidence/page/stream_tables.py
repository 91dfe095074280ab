"""Other streams and other runs: starts, placement, block, class specific, the product's own way, other sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..results import Results
from .cells import MASKED, METRICS, NOT_RUN, STREAMS, bold_span, listed, plural, section, size_text, table, wrap
from .main_table import excess
from .plots import gap_accuracy, growth_points

STARTS = ('gap_start', 'paper_start')
PRODUCT = {'product': '`castream train -c own_data.yaml`', 'augmentation': "the same with timm's augmentation"}
HEAD = ['stream', 'parameters', 'accuracy CA - GAP', *(f'{METRICS[m]} CA - GAP' for m in MASKED), 'seeds', 'images']


def start_section(results: Results, stem: str) -> str:
    """The two starts: saliency, and accuracy against training images and epochs."""
    rows = stream_rows(results, [('main', 'gap_start'), ('initialisation', 'paper_start')])
    blocks = [
        wrap(
            "`stream_init='paper'` draws the stream's weights at random, as the authors do. `stream_init='gap'` starts at "
            'weights under which the logits are those of GAP. Each start has the training settings chosen for it.'
        ),
        table(HEAD, rows) if rows else NOT_RUN,
    ]
    for kind in STARTS:
        runs = [facts['history'] for facts in results.streams.values() if is_reported(results, facts, kind)]
        if runs:
            epochs = [f'{sum(run[i]["accuracy"] for run in runs) / len(runs):.1f}' for i in range(min(map(len, runs)))]
            blocks.append(
                wrap(
                    f'Accuracy after each epoch, on the selection images, mean over '
                    f'{plural(len(runs), "seed")}, {STREAMS[kind]}: {", ".join(epochs)}.'
                )
            )
    points = {kind: dict(growth_points(results, kind)) for kind in STARTS}
    if any(points.values()):
        numbers = results.settings['growth']['per_class']
        gap = gap_accuracy(results)
        blocks += [
            f'![validation accuracy against training images, for both starts]({stem}_growth.png)',
            table(
                ['start', *(f'{n} images a class' for n in numbers)],
                [
                    [STREAMS[kind], *(accuracy_text(found[n]) if n in found else 'not run' for n in numbers)]
                    for kind, found in points.items()
                ],
            ),
            wrap(
                'Validation accuracy in percent; fewer images have more epochs, so that each stream has as many steps.'
                + (f' GAP: {gap:.1f}.' if gap else '')
            ),
        ]
    return section('How the stream starts', *blocks)


def is_reported(results: Results, facts: dict[str, Any], kind: str) -> bool:
    """Whether a stream is one of this kind on all training images, with a reported seed."""
    return (
        facts['kind'] == kind
        and facts['seed'] in results.settings['growth']['seeds']
        and facts['per_class'] is None
        and facts['classes'] is None
    )


def accuracy_text(values: list[float]) -> str:
    """`63.1 (3 seeds)`."""
    return f'{sum(values) / len(values):.1f} ({plural(len(values), "seed")})'


def variant_section(results: Results) -> str:
    """Placement, block and class specific streams: the paper's supplementary tables 3 to 5."""
    variants = [
        ('main', 'gap_start'),
        *(('placement', f's{i}') for i in range(1, 5)),
        ('block', 'proj_ca'),
        ('class_specific', 'class_specific'),
    ]
    rows = stream_rows(results, variants)
    return section(
        "The paper's tables 3, 4 and 5: block, placement, class specific",
        wrap(
            'Grad-CAM, CA - GAP. The first row is the stream of the main table. Bold: the interval of every seed is '
            'on one side of 0.'
        ),
        table(HEAD, rows) if rows else NOT_RUN,
    )


def last_stage_section(results: Results) -> str:
    """The smallest stream with the controls of the main stream: temperatures and baseline maps."""
    names = ('placement', 'last_stage_temperatures', 'last_stage_baselines')
    if not set(names) <= results.settings['tables'].keys():
        return ''
    plain, fitted, baselines = (results.table(name) for name in names)
    text = wrap(
        f'{STREAMS["s4"]} is one block that reads the last stage alone: `stream_start` names that stage. Here it has '
        'the controls that the main stream has above. Grad-CAM, CA - GAP.'
    )
    accuracy = plain.difference('s4', 'accuracy')
    if accuracy is None:
        return section('One block at the last stage', text, NOT_RUN)
    rows = [['accuracy ↑', bold_span(accuracy), '', '', '']]
    rows += [
        [
            METRICS[m],
            bold_span(plain.difference('s4', f'grad_cam/{m}')),
            bold_span(fitted.difference('s4', f'grad_cam/{m}')),
            *(bold_span(excess(plain, baselines, name, m, 's4')) for name in ('random', 'centre')),
        ]
        for m in MASKED
    ]
    return section(
        'One block at the last stage',
        text,
        table(['metric', 'plain', 'with fitted temperatures', 'less that of random', 'less that of centre'], rows),
        f'{size_text(plain, "s4")}.',
    )


def stream_rows(results: Results, variants: Iterable[tuple[str, str]]) -> list[list[str]]:
    """A row for each kind of stream that has run: parameters and Grad-CAM's differences."""
    rows = []
    for name, kind in variants:
        values = results.table(name)
        found = [values.difference(kind, column) for column in ('accuracy', *(f'grad_cam/{m}' for m in MASKED))]
        if found[0] is None:
            continue
        parameters = next(facts['parameters'] for facts in results.streams.values() if facts['kind'] == kind)
        title = PRODUCT.get(name, STREAMS[kind])
        rows.append(
            [title, f'{parameters:,}', *map(bold_span, found), str(len(found[0].values)), str(values.num_images)]
        )
    return rows


def product_section(results: Results) -> str:
    """The product's own commands, without and with augmentation, beside the cached maps."""
    tables = [name for name in PRODUCT if name in results.settings['tables']]
    if not tables:
        return ''
    rows = stream_rows(results, [(name, 'gap_start') for name in ('main', *tables)])
    return section(
        "The product's own way",
        wrap(
            'The same images, network and classifier through `castream train` with the recipe for data of your own, beside '
            'the stream of the main table, which was trained on cached maps. The recipe crops, flips and scales no image. '
            "The last row has timm's random crops, scales and flips, and as many epochs."
        ),
        table(HEAD, rows) if rows else NOT_RUN,
    )


def size_section(results: Results) -> str:
    """The main row with larger images, and with more of them."""
    sizes = results.settings.get('sizes', {})
    if not sizes:
        return ''
    runs = {size_title(results.settings): results}
    runs |= {size_title(results.settings | change): results.of_size(name) for name, change in sizes.items()}
    rows = []
    for title, run in runs.items():
        plain, fitted = run.table('main'), run.table('temperatures')
        accuracy = plain.difference('gap_start', 'accuracy')
        if accuracy is None:
            continue
        rows.append(
            [
                title,
                'none',
                f'{accuracy.gap:.1f}',
                bold_span(accuracy),
                *(bold_span(plain.difference('gap_start', f'grad_cam/{m}')) for m in MASKED),
                str(len(accuracy.values)),
            ]
        )
        rows.append(
            [
                '',
                'fitted',
                '',
                '',
                *(bold_span(fitted.difference('gap_start', f'grad_cam/{m}')) for m in MASKED),
                str(len(accuracy.values)),
            ]
        )
    missing = [title for title, run in runs.items() if not run.table('main').streams]
    return section(
        'Larger images, and more of them',
        wrap(
            'Is it the coarse maps, or the few images? The main row again, with the training settings of the main '
            'table; the classifier under GAP is fitted to the images of each run. Grad-CAM, CA - GAP.'
        ),
        table(['images', 'temperatures', 'accuracy of GAP', *HEAD[2:-1]], rows) if rows else '',
        f'Not run yet: {listed(missing)}.' if missing else '',
    )


def size_title(settings: dict[str, Any]) -> str:
    """`160 pixels, 60 a class`."""
    return f'{settings["image_size"]} pixels, {settings["train_per_class"]} a class'
