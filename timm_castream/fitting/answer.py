"""The answer of a fit: whether the stream helps on images that it was not trained on, and the page that says so."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..evaluation.bootstrap import Estimate, mean_curve
from ..evaluation.report import Report
from ..metrics.table import METRICS

METHODS = ('grad_cam', 'random')
MEASURED = ('average_drop', 'average_gain', 'average_increase')
LEAST_AGREEMENT = 90.0
"""Percent of the images on which CA must predict GAP's class, where there are no labels."""


class Answer(NamedTuple):
    """Whether a stream helps, by the rule of `fit.fit`.

    Attributes:
        helps: Whether it does.
        sentence: The same with the values.
    """

    helps: bool
    sentence: str


def answer(report: Report, has_labels: bool) -> Answer:
    """Reads the answer from a report of Grad-CAM and random maps under both poolings.

    Args:
        report: The report.
        has_labels: Whether the labels are those of the images. Otherwise they are GAP's predictions.
    """
    accuracy = report.differences['accuracy',]
    agreement = report.accuracy['ca'].value
    keeps = not accuracy.high < 0 if has_labels else agreement >= LEAST_AGREEMENT
    beyond = gain_beyond_random(report)
    problems = (
        [] if keeps else ['the accuracy is lower' if has_labels else 'it predicts another class than GAP too often']
    )
    problems += [
        f'{METRICS[metric].symbol} of Grad-CAM is not better'
        for metric in ('average_gain', 'average_increase')
        if report.verdict('grad_cam', metric) != 'better'
    ]
    if not beyond.low > 0:
        problems.append('AG of Grad-CAM gains no more than that of random maps')
    first = f'accuracy {_signed(accuracy)}' if has_labels else f"CA predicts GAP's class on {agreement:.1f} %"
    drop, gain, increase = (report.difference('grad_cam', metric) for metric in MEASURED)
    values = (
        f'{first}; Grad-CAM, CA - GAP: AD {_signed(drop)}, AG {_signed(gain)}, AI {_signed(increase)}; AG beyond random '
        f'maps {_signed(beyond)}'
    )
    if problems:
        return Answer(False, f'It is not shown that the stream helps here, since {", ".join(problems)} ({values}).')
    return Answer(True, f'The stream helps here ({values}).')


def gain_beyond_random(report: Report) -> Estimate:
    """CA - GAP of AG of Grad-CAM minus that of random maps: paired by image, with a bootstrap 95 % interval.

    Images that have all four maps count.
    """
    pairs = report.values.pairs
    (ca, gap), (random_ca, random_gap) = (
        [pairs[f'{pooling}/{method}/average_gain'] for pooling in ('ca', 'gap')] for method in METHODS
    )
    difference = (ca - gap) - (random_ca - random_gap)
    known = ~np.isnan(difference)
    if len(np.unique(pairs['image'][known])) < 2:  # as of all values of one image
        return Estimate(float(difference[known].mean()), math.nan, math.nan)
    ends = mean_curve(difference[known][:, None], pairs['image'][known], report.settings['seed'])
    return Estimate(*(float(end[0]) for end in ends))


def report_text(report: Report, reached: Answer, facts: dict[str, Any]) -> str:
    """The page `report.md`.

    Args:
        report: The values.
        reached: The answer.
        facts: The contents of `fit.json`.
    """
    settings, parts, taken = facts['settings'], facts['parts'], facts['taken']
    tried = ''
    if facts.get('tried'):
        rows = [
            f'| {entry["stream_start"]} | {entry["epochs"]} | {entry["lr"]:g} | {entry["accuracy"]:.1f} | '
            f'{_score(entry["AG"])} | {_score(entry["AI"])} | {"taken" if entry["taken"] else ""} |'
            for entry in facts['tried']
        ]
        tried = '\n'.join(
            [
                '',
                f'Tried on {parts["selection"]} images held out for the choice. AG and AI: of Grad-CAM under CA, less '
                'those of random maps, for the recipes that are accurate enough.',
                '',
                '| stream_start | epochs | lr | accuracy | AG | AI | |',
                '| --- | --- | --- | --- | --- | --- | --- |',
                *rows,
                '',
            ]
        )
    classifier = ''
    if facts.get('classifier'):
        best = max(facts['classifier'], key=lambda entry: entry['accuracy'])
        classifier = (
            f'\nThe classifier was fitted under GAP first, {_counted(best["epochs"])} at {best["lr"]:g}: '
            f'{best["accuracy"]:.1f} % on the images held out for the choice.\n'
        )
    labels = (
        'the class that the folder names'
        if facts['labels_of_test'] == 'folders'
        else (
            "GAP's own prediction: the images have no labels, so GAP's accuracy is 100 % and CA's is the share of images on "
            "which it predicts GAP's class"
        )
    )
    return f"""# A stream beside {settings['network']}

{reached.sentence}

Fitted on {parts['train']} images, `labels='{settings['labels']}'`, seed {settings['seed']}:
stream_start {taken['stream_start']}, {_counted(taken['epochs'])}, learning rate {taken['lr']:g}.
{classifier}{tried}
## Measured on {report.num_images} images that were not trained on

The label of an image is {labels}.

```
{report}
```

{report.summary()}

## Use it

```python
import timm
import timm_castream

model = timm.create_model('local-dir:model', pretrained=True)  # in this folder
```

or `timm_castream.load_stream(model, 'stream.safetensors')` on the network with the same weights and
`timm_castream.attach(model, {', '.join(f'{k}={v!r}' for k, v in facts['stream_args'].items())})`.
"""


def _counted(epochs: int) -> str:
    return '1 epoch' if epochs == 1 else f'{epochs} epochs'


def _score(value: float | None) -> str:
    return '' if value is None else f'{value:.1f}'


def _signed(estimate: Estimate) -> str:
    value, low, high = (f'{number:+.1f}' for number in estimate)
    return value if math.isnan(estimate.low) else f'{value} [{low}, {high}]'
