"""The picture, the curves, the maps and the values of one explained image, as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .. import pictures
from ..version import __version__
from ..visualize import COLOURS, EARLY_STAGES, OPACITY, Panel, draw_grid, named_classes, overlay, save
from .explanation import Explanation, MapScores
from .page_model import method_title


def draw_explanation(
    explanation: Explanation, methods: Sequence[str], target: int, opacity: float = OPACITY, colours: str = COLOURS[0]
) -> Image.Image:
    """The picture of an explanation: a row for each pooling with every method, then the attention, last stage first.

    Args:
        explanation: Of an image.
        methods: Names of methods.
        target: Index of the class.
        opacity, colours: As for `pictures.overlay`.
    """
    opened = explanation.opened
    label = opened.class_name(target)
    maps = explanation.maps(methods, target)
    original = Panel(opened.name[:40], explanation.pixels)

    def panel(title: str, values: Tensor) -> Panel:
        note = pictures.map_note(values)
        return Panel(f'{title}\n{note}' if note else title, overlay(explanation.pixels, values, opacity, colours))

    rows = []
    for name in opened.predictor.poolings if methods else ():
        title = f'{opened.pooling_names[name]}: {label[:22]} {explanation.probabilities[name][target]:.2f}'
        row = [panel(f'{method_title(method)}\n{title}', maps[name, method]) for method in methods]
        rows.append([original, *row])
    attention = [
        panel(f'{method_title("attention")}\n{stage}', values)
        for stage, values in reversed(explanation.attention.items())
    ]
    if attention or not rows:
        rows.append([original, *attention])
    return draw_grid(rows, EARLY_STAGES if attention else '')


def draw_scores(scores: dict[str, MapScores], names: Mapping[str, str]) -> Figure:
    """The insertion and deletion curves of every pooling in one plot.

    Args:
        scores: Of `Explanation.scores`.
        names: {pooling: its name}.
    """
    figure = Figure(figsize=(5.6, 3.6), layout='constrained')
    axes = figure.subplots()
    for colour, (name, measured) in zip(('#6b7280', '#d9480f'), scores.items(), strict=False):
        for curve, style, title in (
            (measured.insertion_curve, '-', f'insertion {measured.metrics["insertion"]:.1f} %'),
            (measured.deletion_curve, '--', f'deletion {measured.metrics["deletion"]:.1f} %'),
        ):
            share = np.linspace(0, 100, len(curve))
            axes.plot(share, curve.numpy(), style, color=colour, label=f'{names[name]}, {title}')
    axes.set(xlabel='pixels changed, most salient first (%)', ylabel='probability', xlim=(0, 100))
    axes.set_ylim(bottom=0)  # the probabilities of an unlikely class are small
    axes.spines[['top', 'right']].set_visible(False)
    figure.legend(loc='outside upper center', ncols=2, frameon=False, fontsize='small')
    return figure


def write_explanation(
    explanation: Explanation,
    folder: str | Path,
    methods: Sequence[str],
    target: int,
    opacity: float = OPACITY,
    measured: str | None = None,
    colours: str = COLOURS[0],
) -> list[Path]:
    """Writes the picture and the values of an explanation.

    Args:
        explanation: Of an image.
        folder: Gets `explanation.png`, `explanation.json` and, where a method is measured, `curves.png`.
        methods: Names of the methods in the picture.
        target: Index of the class.
        opacity, colours: As for `pictures.overlay`.
        measured: Name of the method whose scores are in the values, or None.

    Returns:
        The files.
    """
    opened, folder = explanation.opened, Path(folder)
    worth = explanation.scores(measured, target) if measured else {}
    files = [save(draw_explanation(explanation, methods, target, opacity, colours), folder / 'explanation.png')]
    if worth:
        files.append(save(draw_scores(worth, opened.pooling_names), folder / 'curves.png'))
    facts: dict[str, Any] = {
        'model': opened.name,
        'weights': opened.weights,
        'versions': {'timm_castream': __version__, 'timm': timm.__version__, 'torch': torch.__version__},
        'input_size': list(explanation.x.shape[1:]),
        'class': {'index': target, 'name': opened.class_name(target)},
        'top': _top_classes(explanation),
        'attention': {stage: values.tolist() for stage, values in explanation.attention.items()},
        'maps': {
            method: {
                name: values.tolist()
                for (name, row), values in explanation.maps(methods, target).items()
                if row == method
            }
            for method in methods
        },
        'opacity': opacity,
        'worth': {measured: {name: value.to_dict() for name, value in worth.items()}} if worth else {},
    }
    if opened.predictor.has_stream:
        logits, cam = explanation.identity()
        facts['identity'] = {
            'attention_logits': logits[0].tolist(),
            'cam': cam[0].tolist(),
            'largest_difference': (logits - cam).abs().max().item(),
        }
    path = folder / 'explanation.json'
    path.write_text(json.dumps(facts, indent=1) + '\n', encoding='utf-8')
    return [*files, path]


def write_maps(
    explanation: Explanation,
    folder: str | Path,
    methods: Sequence[str],
    target: int,
    opacity: float = OPACITY,
    colours: str = COLOURS[0],
) -> list[Path]:
    """Writes the maps of an explanation as arrays and over the whole photograph, as `castream explain --save-maps`.

    Args:
        explanation: Of an image.
        folder: Gets `METHOD_POOLING.npy`, `METHOD_POOLING.jpg`, the same of the attention, and `explanation.json`.
        methods: Names of methods.
        target: Index of the class.
        opacity, colours: As for `pictures.overlay`.

    Returns:
        The files.

    Raises:
        FileNotFoundError: If the image was deleted.
    """
    # A colon, as in captum:Saliency, is no character of a file's name everywhere.
    maps = {
        f'{method.replace(":", "_")}_{name}': values
        for (name, method), values in explanation.maps(methods, target).items()
    }
    maps |= {f'attention_{stage}': values for stage, values in explanation.attention.items()}
    facts = {
        'class': {'index': target, 'name': explanation.opened.class_name(target)},
        'top': _top_classes(explanation),
    }
    return pictures.write_maps(Path(folder), explanation.photograph(), explanation.crop, maps, facts, opacity, colours)


def _top_classes(explanation: Explanation) -> dict[str, list[dict[str, Any]]]:
    opened = explanation.opened
    return named_classes(opened.model, {name: explanation.top(name) for name in opened.predictor.poolings})
