"""Attention as a saliency map of its own: beside baseline maps, by the boxes, on classes without training images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..results import Results, Table
from ..statistics import compare
from .cells import (
    BOXES,
    MASKED,
    METHODS,
    METRICS,
    NOT_RUN,
    listed,
    mean_text,
    section,
    size_text,
    span,
    symbol,
    table,
    wrap,
)

BASELINES = ('attention', 'random', 'centre')


def localisation_section(results: Results) -> str:
    """Attention alone and the baselines; SP and EP by the boxes."""
    title, text = (
        'Attention alone, and baseline maps',
        wrap(
            'The raw attention of the last stage is a saliency map of its own, the same for every class. `random` is one '
            'random value a location, `centre` a Gaussian in the middle of the image; both under each pooling. A metric '
            'that cannot tell a method from them says little about it. SP: the most salient pixel lies in the box of the '
            'object. EP: share of the saliency inside the box.'
        ),
    )
    main, masked, boxes = (results.table(name) for name in ('main', 'attention', 'localisation'))
    rows = []
    for method in METHODS:
        for pooling in ('gap', 'ca'):
            sources = [
                *[(masked if method in BASELINES else main, metric) for metric in MASKED],
                *[(boxes, metric) for metric in BOXES],
            ]
            figures = [mean_text(source, 'gap_start', pooling, f'{method}/{metric}') for source, metric in sources]
            if any(figures):
                rows.append([METHODS[method], pooling.upper(), *figures])
    if not rows:
        return section(title, text, NOT_RUN)
    compared = []
    for metric in BOXES:
        difference = boxes.difference('gap_start', f'attention/{metric}', f'grad_cam/{metric}')
        if difference is not None:
            compared.append(f'{symbol(metric)} {span(difference)} ({difference.verdict})')
    note = [f'AD, AG and AI on {masked.num_images or "no"} images, SP and EP on {boxes.num_images or "no"} images.']
    if compared:
        note += [f"Attention less GAP's Grad-CAM: {listed(compared)}.", f'Attention less centre: {against(boxes)}.']
    return section(
        title, text, table(['method', 'pooling', *(METRICS[m] for m in (*MASKED, *BOXES))], rows), wrap(' '.join(note))
    )


def unseen_section(results: Results, pictures: Mapping[str, Any] | None, stem: str) -> str:
    """The paper's Figure 2: attention on classes that the stream was not trained on.

    Args:
        results: The results.
        pictures: The facts of the photographs, or None.
        stem: The page's name, with which the pictures' names begin.
    """
    title, text = (
        "The paper's Figure 2: classes without training images of the stream",
        wrap(
            'A stream trained on every second class, its raw attention on images of the others. The frozen network and its '
            'classifier were trained on all classes.'
        ),
    )
    values = results.table('unseen_classes')
    if not values.streams:
        return section(title, text, NOT_RUN)
    rows = [
        [METHODS[method], *(mean_text(values, 'gap_start', 'ca', f'{method}/{m}') for m in BOXES)]
        for method in BASELINES
    ]
    notes = ' '.join(f'Attention less {other}: {against(values, other)}.' for other in BASELINES[1:])
    blocks = [text, table(['map', *(METRICS[m] for m in BOXES)], rows), wrap(f'{size_text(values)}. {notes}')]
    if pictures is not None and 'unseen_columns' in pictures:
        blocks += [
            f'![{pictures["unseen_columns"]}]({stem}_unseen.jpg)',
            wrap(f'{pictures["unseen_columns"]}. GAP predicts: {listed(pictures["unseen_classes"])}.'),
        ]
    return section(title, *blocks)


def against(values: Table, other: str = 'centre') -> str:
    """Attention's SP and EP minus those of a baseline map, paired by image."""
    parts = []
    for metric in BOXES:
        runs = [run[f'attention/{metric}'] - run[f'{other}/{metric}'] for run in values.streams['gap_start'].values()]
        difference = compare(np.zeros(len(runs[0])), runs)
        parts.append(f'{symbol(metric)} {span(difference)} ({difference.verdict})')
    return listed(parts)
