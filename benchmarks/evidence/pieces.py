"""The evaluations: a piece is one table's images, methods and metrics under GAP, or under one stream of one seed.

Each piece ends as the values of every image, `pieces/NAME.csv.gz`, and its facts, `pieces/NAME.json`.
"""

from __future__ import annotations

import csv
import gzip
import shutil
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
from torch._inductor import config as inductor
from torch.utils.data import DataLoader, Subset

from timm_castream._utils.files import write_whole
from timm_castream.evaluate import evaluate
from timm_castream.evaluation.calibration import fit_temperature
from timm_castream.evaluation.report import Report

from .choice import BATCH, MASKED, recipe_of
from .product import RECIPE, product_model
from .setup import Setup, read_json

METRICS = {'masked': MASKED, 'curves': ('insertion', 'deletion'), 'boxes': ('pointing_game', 'energy_pointing_game')}


def run_table(setup: Setup, table: str, streams: Container[str] | None, seeds: Container[int] | None) -> None:
    """The pieces of a table: GAP first, unless another table has it, then every stream, seed by seed.

    Args:
        setup: The run.
        table: Of `tables` in the settings.
        streams, seeds: Only these. None: those of the settings.
    """
    plan = setup.settings['tables'][table]
    if 'gap' not in plan:
        run_piece(setup, table, None, 0)
    for seed in plan['seeds']:
        for stream in plan['streams']:
            if (seeds is None or seed in seeds) and (streams is None or stream in streams):
                run_piece(setup, table, stream, seed)


def run_piece(setup: Setup, table: str, stream: str | None, seed: int) -> None:
    """Trains what a piece needs, evaluates it and writes its values, unless that is done. No stream is GAP."""
    plan = setup.settings['tables'][table]
    name, pooling = (f'{table}-gap', 'gap') if stream is None else (f'{table}-{stream}-{seed}', 'ca')
    path = setup.results_dir / 'pieces' / f'{name}.json'
    by_product, half = plan.get('train') == 'product', plan.get('train_on') == 'half'
    facts: dict[str, Any] = {
        'table': table,
        'stream': stream,
        'seed': seed,
        'images': plan['images'],
        'methods': [method for method in plan['methods'] if stream or method != 'attention'],
        'metrics': [metric for group in plan['metrics'] for metric in METRICS[group]],
        'recipe': None,
        'network': setup.settings['network'],
        'image_size': setup.settings['image_size'],
    }
    if stream is not None:
        facts['recipe'] = {'file': RECIPE, **plan.get('changes', {})} if by_product else recipe_of(setup, stream)
    if path.is_file() and facts.items() <= read_json(path).items():
        return
    if stream is None:
        model = setup.gap_model()
    elif by_product:
        model = product_model(setup, seed, plan.get('changes', {}))
    else:
        more = {'classes': setup.half_of_classes} if half else {}
        model, training = setup.stream(stream, seed, facts['recipe'], f'{stream}-{seed}' + '-half' * half, **more)
        facts['training_seconds'] = training['seconds']
    if plan.get('temperature'):
        facts['temperature'] = fit_temperature(setup.logits(model, 'selection'), setup.labels('selection'))
    images = setup.images('unseen' if half else 'val')
    images = Subset(images.dataset, images.indices[: plan['images']])
    folder = setup.work_dir / 'evaluations' / name
    start = time.monotonic()
    print(f'{name}: {len(images)} images', flush=True)
    # Frozen weights: the compiler folds batch normalisation into the convolutions.
    with inductor.patch(freezing=True):
        report = evaluate(
            model,
            DataLoader(images, BATCH),
            facts['methods'],
            (pooling,),
            metrics=facts['metrics'],
            channels_last=True,
            torchcompile=plan.get('torchcompile', False),
            temperature={pooling: facts['temperature']} if 'temperature' in facts else None,
            output_dir=folder,
            progress=True,
        )
    facts |= {'images_found': len(images), 'seconds': round(time.monotonic() - start, 1)}
    write_values(report, path.with_suffix('.csv.gz'))
    setup.write(path, facts)
    shutil.rmtree(folder)


def write_values(report: Report, path: Path) -> None:
    """Writes the values of every image with a few digits, compressed to the same bytes each time."""
    found = {**report.values.images, **report.values.pairs}
    # One evaluation has one pooling, so its name is left out.
    columns = {k.partition('/')[2] or k: array for k, array in found.items() if array.ndim == 1 and array.dtype != bool}
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path, 'wb') as raw, gzip.GzipFile('', 'wb', 9, raw, mtime=0) as file:
        np.savetxt(file, np.column_stack([*columns.values()]), '%.5g', ',', header=','.join(columns), comments='')


def read_values(path: Path) -> dict[str, np.ndarray]:
    """The columns of a piece's values, sorted by image; NaN where an image has no value."""
    with gzip.open(path, 'rt', encoding='utf-8', newline='') as file:
        names, *rows = csv.reader(file)
    table = np.array([[float(value) if value else np.nan for value in row] for row in rows])
    return dict(zip(names, table[np.argsort(table[:, 0], kind='stable')].T, strict=True))
