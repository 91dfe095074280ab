"""The main table, fitted temperatures, and what the baseline maps gain."""

from __future__ import annotations

import numpy as np

from ..results import Results, Table
from ..statistics import LOWER_IS_BETTER, Difference, compare
from .cells import (
    CURVES,
    MASKED,
    METHODS,
    METRICS,
    NOT_RUN,
    bold_span,
    cells,
    listed,
    plural,
    section,
    size_text,
    span,
    table,
    wrap,
)

CAMS = ('grad_cam', 'grad_cam_pp', 'score_cam')


def main_rows(results: Results) -> list[tuple[str, str, Table, Difference]]:
    """The main figures that have run: method, metric, table and CA - GAP."""
    main, curves, score_cam = (results.table(name) for name in ('main', 'curves', 'score_cam'))
    columns = [('', 'accuracy ↑', main, 'accuracy'), ('', 'probability', main, 'prob')]
    for method in CAMS:
        masked, curved = (score_cam, score_cam) if method == 'score_cam' else (main, curves)
        columns += [(METHODS[method], METRICS[metric], masked, f'{method}/{metric}') for metric in MASKED]
        columns += [(METHODS[method], METRICS[metric], curved, f'{method}/{metric}') for metric in CURVES]
    rows = [(*words, source, source.difference('gap_start', column)) for *words, source, column in columns]
    return [(method, metric, source, found) for method, metric, source, found in rows if found is not None]


def main_section(results: Results) -> str:
    """Accuracy, probability and the paper's five metrics."""
    rows = main_rows(results)
    head = ['method', 'metric', 'GAP', 'CA', 'CA - GAP', '', 'seeds', 'images']
    return section(
        'Main table',
        wrap(
            'GAP and CA read the same frozen network and the same classifier, on the same images; the class explained is '
            'the label. GAP is the same under every seed. The figure of CA and the difference are means over the seeds; in '
            'brackets are the lowest and the highest end of the 95 % intervals of all seeds. Probability is the mean '
            'probability of the label: AG and AI are easier for a network that is less sure. All figures are in percent.'
        ),
        table(
            head,
            [
                [method, metric, *cells(difference), str(len(difference.values)), str(source.num_images)]
                for method, metric, source, difference in rows
            ],
        )
        if rows
        else NOT_RUN,
    )


def temperature_section(results: Results) -> str:
    """The main figures with fitted temperatures beside the plain ones."""
    fitted, plain = results.table('temperatures'), results.table('main')
    text = wrap(
        'AG and AI ask whether the masked image is more probable than the clean one, so a network that is less sure '
        'gains more easily. Here the logits of each pooling are divided by the temperature that minimises the cross '
        'entropy on images held out of the training images; the saliency maps stay the same.'
    )
    if fitted.difference('gap_start', 'prob') is None:
        return section('With fitted temperatures', text, NOT_RUN)
    facts = [piece for piece in results.facts.values() if piece['table'] == 'temperatures']
    facts.sort(key=lambda piece: (piece['stream'] is not None, piece['seed']))  # GAP's first
    values = [f'{piece["temperature"]:.2f}' for piece in facts]
    columns = [
        ('', 'probability', 'prob'),
        *((METHODS[method], METRICS[metric], f'{method}/{metric}') for method in CAMS[:2] for metric in MASKED),
    ]
    rows = []
    for method, metric, column in columns:
        difference, without = fitted.difference('gap_start', column), plain.difference('gap_start', column)
        if difference is not None:
            rows.append([method, metric, *cells(difference), span(without) if without else 'not run'])
    return section(
        'With fitted temperatures',
        text,
        table(['method', 'metric', 'GAP', 'CA', 'CA - GAP', '', 'CA - GAP without'], rows),
        wrap(f'Temperatures: GAP {values[0]}, CA {listed(values[1:])}. {size_text(fitted)}.'),
    )


def baseline_section(results: Results) -> str:
    """How much of the gain the baseline maps have too."""
    main, baselines = results.table('main'), results.table('attention')
    text = wrap(
        'AD, AG and AI depend on the map and on how the network takes a masked image. The baseline maps `random` and '
        '`centre` do not depend on the image, so their CA - GAP is the second part alone. The last two rows are what '
        "is left of Grad-CAM's CA - GAP, paired by image and seed on the same images. Bold: better or worse in every "
        'seed.'
    )
    rows = {
        f'{METHODS[name]}, CA - GAP': [baselines.difference('gap_start', f'{name}/{m}') for m in MASKED]
        for name in ('random', 'centre')
    }
    rows |= {
        f"Grad-CAM's CA - GAP less that of {METHODS[name]}": [excess(main, baselines, name, m) for m in MASKED]
        for name in ('random', 'centre')
    }
    if any(difference is None for row in rows.values() for difference in row):
        return section('The maps, or the network?', text, NOT_RUN)
    return section(
        'The maps, or the network?',
        text,
        table(['', *(METRICS[m] for m in MASKED)], [[title, *map(bold_span, row)] for title, row in rows.items()]),
        f'{baselines.num_images} images, {plural(len(baselines.streams["gap_start"]), "seed")}.',
    )


def excess(cams: Table, baselines: Table, baseline: str, metric: str, stream: str = 'gap_start') -> Difference | None:
    """How much more CA changes a metric of Grad-CAM than that of a baseline map.

    Args:
        cams: A table with Grad-CAM.
        baselines: A table with the baselines, on the first images of that table.
        baseline: `random` or `centre`.
        metric: AD, AG or AI.
        stream: Kind of stream.

    Returns:
        (CA - GAP of Grad-CAM) - (CA - GAP of the baseline), paired by image, or None where a part has not run.
    """
    column, other = f'grad_cam/{metric}', f'{baseline}/{metric}'
    seeds = cams.streams.get(stream, {}).keys() & baselines.streams.get(stream, {}).keys()
    if cams.gap is None or baselines.gap is None or not seeds:
        return None
    count = baselines.num_images
    runs = [
        cams.streams[stream][seed][column][:count]
        - cams.gap[column][:count]
        - baselines.streams[stream][seed][other]
        + baselines.gap[other][:count]
        for seed in sorted(seeds)
    ]
    return compare(np.zeros(count), runs, metric in LOWER_IS_BETTER)
