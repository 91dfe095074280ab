"""The demo: a trained ImageNet network and its stream on photographs that come with scikit-image and scikit-learn.

Classes, attention, Grad-CAM under both poolings, and what the maps are worth by the paper's metrics.
"""

from __future__ import annotations

import json
import logging
import platform
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .._utils.files import counted, make_folder, move_files
from ..attach import POOLINGS, forward_both
from ..attribution.methods import method_title
from ..backbones.image_settings import image_loader
from ..datasets import open_image
from ..datasets.photographs import photographs
from ..evaluate import evaluate
from ..evaluation.report import Report
from ..hub.load import DEFAULT_MODEL, open_model
from ..metrics.table import METRICS
from ..version import __version__
from ..visualize import class_name, explain

METHODS = ('attention', 'grad_cam', 'random')

BATCH = 2  # a step of the progress bar

_logger = logging.getLogger(__name__)


class _Photographs:
    """Image files as a data set; the loader sets `transform`. There are no labels, so each is 0."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(open_image(self.paths[index])), 0


def explain_photographs(
    output_dir: str | Path, model: nn.Module | None = None, paths: Sequence[str | Path] | None = None
) -> Report:
    """Explains photographs, measures the maps, and writes a report with pictures.

    Args:
        output_dir: Gets `report.md`, `pictures/` (a row an image, and all rows in `grid.png`), and the values
            `metrics.json` and `images.csv`. They appear together at the end; an interrupted demo leaves nothing.
        model: A model with a stream. None: `hub.load.DEFAULT_MODEL` with its published weights.
        paths: Image files. None: those of `datasets.photographs`.

    Returns:
        The report of the interpretability protocol; the class explained is the one predicted under each pooling.

    Raises:
        ValueError: If the model has no stream.
        RuntimeError: If the published weights are neither installed nor to be downloaded.
    """
    start = time.monotonic()
    files = [Path(path) for path in (photographs() if paths is None else paths)]
    name = DEFAULT_MODEL if model is None else type(model).__name__
    _logger.info('%d photographs, %s: pictures, then measurements.', len(files), name)
    network: Any = (open_model(None) if model is None else model).eval()
    output = make_folder(output_dir)
    with tempfile.TemporaryDirectory(dir=output, prefix='.unfinished-') as scratch:
        folder = Path(scratch)
        explain(network, files, ('attention', 'grad_cam'), folder / 'pictures', POOLINGS)
        loader = image_loader(network, _Photographs(files), BATCH, use_prefetcher=False)
        report = evaluate(network, loader, METHODS, POOLINGS, target='predicted', progress=True)
        facts = {
            'model': name,
            'photographs': [file.name for file in files],
            'classes': _classes(network, files),
            'evaluation': report.to_dict(),
        }
        (folder / 'metrics.json').write_text(json.dumps(facts, indent=2) + '\n', encoding='utf-8')
        with open(folder / 'images.csv', 'w', encoding='utf-8') as csv_file:
            report.values.write_csv(csv_file)
        seconds = time.monotonic() - start
        (folder / 'report.md').write_text(_report_text(report, facts, seconds), encoding='utf-8')
        move_files(folder, output)
    return report


def summary(report: Report) -> str:
    """The table of a report as Markdown: a line a method and pooling, and the paired differences.

    Args:
        report: Of `explain_photographs`.
    """
    names = tuple(report.metrics)
    lines = [
        ' | '.join(('| map', 'pooling', *(METRICS[name].heading for name in names))) + ' |',
        '| --- ' * (len(names) + 2) + '|',
    ]
    for method in report.methods:
        title = method_title(method)
        for pooling in POOLINGS:
            values = (f'{report[pooling, method, name].value:.1f}' for name in names)
            lines.append(' | '.join((f'| {title}', pooling.upper(), *values)) + ' |')
        differences = (report.difference(method, name) for name in names)
        cells = (f'{value:+.1f} [{low:.1f}, {high:.1f}]' for value, low, high in differences)
        lines.append(' | '.join((f'| {title}', 'CA - GAP', *cells)) + ' |')
    return '\n'.join(lines)


@torch.no_grad()
def _classes(model: Any, files: Sequence[Path]) -> dict[str, dict[str, tuple[str, float]]]:
    """{photograph: {pooling: (name of the class predicted, its probability)}}."""
    found: dict[str, dict[str, tuple[str, float]]] = {file.name: {} for file in files}
    left = iter(found.values())
    for x, _ in image_loader(model, _Photographs(files), BATCH, use_prefetcher=False):
        rows = list(islice(left, len(x)))
        for pooling, logits in forward_both(model, x.to(next(model.parameters()).device)).items():
            values, indices = logits.softmax(1).max(1)
            for row, value, index in zip(rows, values.tolist(), indices.tolist(), strict=True):
                row[pooling] = (class_name(model, index), value)
    return found


def _report_text(report: Report, facts: dict[str, Any], seconds: float) -> str:
    model, threads = facts['model'], counted(torch.get_num_threads(), 'thread')
    rows = '\n'.join(
        f'| [{name}](pictures/{Path(name).stem}.png) | '
        + ' | '.join(f'{label} {100 * value:.0f} %' for label, value in (found[pooling] for pooling in POOLINGS))
        + ' |'
        for name, found in facts['classes'].items()
    )
    return f"""# Where does {model} look?

`castream demo`: {seconds:.0f} seconds with {threads} on {platform.machine()}, torch
{torch.__version__}, timm {timm.__version__}, timm_castream {__version__}.

![Each photograph, the attention of the last stage, Grad-CAM under both poolings, the attention of the early stages](pictures/grid.png)

Each row: the photograph as the network gets it, the attention with which the stream averages the last feature map,
Grad-CAM with average pooling (GAP) and with the stream (CA), and the attention of the early stages.

## What the network sees

| photograph | GAP | CA |
| --- | --- | --- |
{rows}

## Do the maps show what the network uses?

{summary(report)}

In percent; a low value is better under ↓, a high one under ↑. The class explained is the one predicted. A map is good
if the image that it leaves keeps the class. AD: the share of the probability that is lost when the map masks the image.
AG and AI: the share of the missing probability that is gained, and how often. I and D: the mean probability while the
most salient pixels are put into a blurred image, and taken out of the image. `Random` is a map of random values: a
method that is not better explains nothing. In brackets are 95 % intervals over the photographs. {len(facts['classes'])}
photographs show how it works, not which pooling is better: see `docs/evidence.md` for that.

## Where to go next

| you want to | run |
| --- | --- |
| explain a photograph of yours | `castream explain photo.jpg` |
| look, choose a class and compare in the browser | `castream app` |
| measure saliency maps on a folder of images | `castream evaluate --model {model} --pretrained --data-dir FOLDER --target predicted` |
| give another network a stream, from a folder of images | `castream fit --model resnet18 --pretrained --images FOLDER --output fitted` |
| train a network and its stream from nothing, in ten minutes | `castream demo --train` |
"""
