"""The evaluations: a piece is one table's images, methods and metrics under GAP, or under one stream of one seed.

Each piece ends as the values of every image, `pieces/NAME.csv.gz`, and its facts, `pieces/NAME.json`.
"""

from __future__ import annotations

import csv
import gzip
import io
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch._inductor import config as inductor
from torch.utils.data import DataLoader

from timm_castream.evaluate import evaluate
from timm_castream.evaluation.calibration import fit_temperature

from .choice import recipe_of
from .images import Images
from .product import RECIPE, product_model
from .setup import Setup, read_json

METRICS = {
    'masked': ('average_drop', 'average_gain', 'average_increase'),
    'curves': ('insertion', 'deletion'),
    'boxes': ('pointing_game', 'energy_pointing_game'),
}
NEEDS_STREAM = ('attention',)
BATCH = 32
DIGITS = 5
HALF = 2  # `train_on: half`: every second class from the first one on trains, the others are looked at


@dataclass(frozen=True)
class Piece:
    """One evaluation.

    Args:
        table: Its table in the settings.
        stream: Kind of stream, or None for GAP.
        seed: Seed of the stream.
    """

    table: str
    stream: str | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        return f'{self.table}-gap' if self.stream is None else f'{self.table}-{self.stream}-{self.seed}'


def pieces(settings: dict[str, Any], table: str) -> Iterator[Piece]:
    """The pieces of a table: GAP first, unless another table has it, then every stream, seed by seed."""
    facts = settings['tables'][table]
    if 'gap' not in facts:
        yield Piece(table)
    for seed in facts['seeds']:
        for stream in facts['streams']:
            yield Piece(table, stream, seed)


def run_piece(setup: Setup, piece: Piece) -> None:
    """Trains what the piece needs, evaluates it and writes its values, unless that is done."""
    table = setup.settings['tables'][piece.table]
    path = setup.results_dir / 'pieces' / f'{piece.name}.json'
    methods = [m for m in table['methods'] if piece.stream or m not in NEEDS_STREAM]
    facts: dict[str, Any] = {
        'table': piece.table,
        'stream': piece.stream,
        'seed': piece.seed,
        'images': table['images'],
        'methods': methods,
        'metrics': [name for group in table['metrics'] for name in METRICS[group]],
        'recipe': None,
        'network': setup.settings['network'],
        'image_size': setup.settings['image_size'],
    }
    by_product = table.get('train') == 'product'
    if piece.stream is not None:
        facts['recipe'] = {'file': RECIPE, **table.get('changes', {})} if by_product else recipe_of(setup, piece.stream)
    if path.is_file() and facts.items() <= read_json(path).items():
        return
    if piece.stream is None:
        model = setup.gap_model()
    elif by_product:
        model = product_model(setup, piece.seed, table.get('changes', {}))
    else:
        classes = range(0, setup.num_classes, HALF) if table.get('train_on') == 'half' else None
        name = f'{piece.stream}-{piece.seed}' + ('' if classes is None else '-half')
        model, training = setup.stream(piece.stream, piece.seed, facts['recipe'], name, classes=classes)
        facts['training_seconds'] = training['seconds']
    if table.get('temperature'):
        facts['temperature'] = fit_temperature(setup.logits(model, 'selection'), setup.labels('selection'))
    images = _images(setup, table)
    pooling = 'gap' if piece.stream is None else 'ca'
    folder = setup.work_dir / 'evaluations' / piece.name
    more = {'temperature': {pooling: facts['temperature']}} if 'temperature' in facts else {}
    start = time.monotonic()
    print(f'{piece.name}: {len(images)} images', flush=True)
    # Frozen weights: the compiler folds batch normalisation into the convolutions.
    with inductor.patch(freezing=True):
        evaluate(
            model,
            DataLoader(images, batch_size=BATCH),
            methods=methods,
            poolings=(pooling,),
            metrics=facts['metrics'],
            channels_last=True,
            torchcompile=table.get('torchcompile', False),
            output_dir=folder,
            progress=True,
            **more,
        )
    facts |= {'images_found': len(images), 'seconds': round(time.monotonic() - start, 1)}
    copy_values(folder / 'images.csv', path.with_suffix('.csv.gz'))
    setup.write(path, facts)
    shutil.rmtree(folder)


def _images(setup: Setup, table: dict[str, Any]) -> Images:
    samples = setup.samples('val')
    if table.get('train_on') == 'half':
        samples = [sample for sample in setup.image_set.val if sample.label % HALF]
    return Images(samples[: table['images']], setup.unfitted, setup.settings['image_size'])


def copy_values(source: Path, target: Path) -> None:
    """Copies the values of every image with a few digits, compressed to the same bytes each time."""
    with open(source, encoding='utf-8', newline='') as file:
        names, *rows = csv.reader(file)
    numbers = [i for i, name in enumerate(names) if name != 'file' and not name.endswith('/class_name')]
    names, *rows = ([row[i] for i in numbers if i < len(row)] for row in (names, *rows))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    # One evaluation has one pooling, so its name is left out.
    writer.writerow([name.partition('/')[2] or name for name in names])
    for row in rows:
        writer.writerow([value and f'{float(value):.{DIGITS}g}' for value in row])
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix('.tmp')
    with open(temporary, 'wb') as raw, gzip.GzipFile('', 'wb', 9, raw, mtime=0) as packed:
        packed.write(text.getvalue().encode())
    temporary.replace(target)


def read_values(path: Path) -> dict[str, np.ndarray]:
    """The columns of a piece's values, sorted by image; NaN where an image has no value."""
    with gzip.open(path, 'rt', encoding='utf-8', newline='') as file:
        names, *rows = csv.reader(file)
    table = np.array([[float(value) if value else np.nan for value in row] for row in rows])
    table = table[np.argsort(table[:, 0], kind='stable')]
    return dict(zip(names, table.T, strict=True))
