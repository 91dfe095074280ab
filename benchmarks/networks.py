"""Attaches a stream to every network of timm that takes one, on the meta device, and writes the table of the docs.

python benchmarks/networks.py docs/networks.csv
python benchmarks/networks.py /tmp/vit.csv 'vit_*'
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from tqdm import tqdm

import timm_castream
from timm_castream.backbones import architectures
from timm_castream.backbones.layout import NHWC, Tokens
from timm_castream.backbones.stages import HeadPooling, head_pooling

COLUMNS = ('network', 'file of timm', 'pooling', 'stages', 'stream parameters')


class Row(NamedTuple):
    """One network.

    Attributes:
        name: Name of the architecture.
        pooling: How it pools.
        stages: Names of the default stages.
        parameters: Parameters of the stream.
    """

    name: str
    pooling: str
    stages: tuple[str, ...]
    parameters: int


def main() -> int:
    args = parse_args()
    names = [name for name in architectures.architectures() if name in timm.list_models(args.filter)]
    rows, failures = [], []
    for name in tqdm(names, disable=None):
        try:
            rows.append(row_of(name))
        except Exception as error:  # the sweep tells all of them
            failures.append(f'{name}: {type(error).__name__}: {error}')
    write_table(rows, args.output)
    print(f'{len(rows)} of {len(names)} networks take a stream, the table is in {args.output}.')
    print('\n'.join(failures))
    return 1 if failures else 0


def row_of(name: str) -> Row:
    """Attaches a stream to one network, and takes it off again."""
    with torch.device('meta'):  # parameters are counted, not made
        model: Any = timm.create_model(name)
    keys = list(model.state_dict())
    timm_castream.attach(model)
    pooled = model.pooled_stage
    kind = head_pooling(model, pooled, model.forward_gap_head)
    what = (
        'patch tokens'
        if isinstance(pooled.layout, Tokens)
        else 'a map (B, H, W, D)'
        if isinstance(pooled.layout, NHWC)
        else 'a map (B, D, H, W)'
    )
    pooling = 'class token' if kind is HeadPooling.CLASS_TOKEN else f'average of {what}'
    row = Row(name, pooling, model.castream_stages, sum(p.numel() for p in model.castream.parameters()))
    timm_castream.detach(model)
    if list(model.state_dict()) != keys:
        raise RuntimeError('detach did not give the network back')
    return row


def write_table(rows: Iterable[Row], path: Path) -> None:
    """The table of the docs, sorted by the file of timm.models."""
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(COLUMNS)
        for row in sorted(rows, key=lambda row: architectures.file_of(row.name)):
            stages = ' '.join(row.stages)
            writer.writerow((row.name, architectures.file_of(row.name), row.pooling, stages, row.parameters))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('output', type=Path, help='the CSV file to write')
    parser.add_argument('filter', nargs='?', default='*', help='as for timm.list_models (default: all)')
    return parser.parse_args()


if __name__ == '__main__':
    sys.exit(main())
