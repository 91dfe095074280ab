"""Digits: trains a GAP network and then its CA-Stream on real pixels, and compares the saliency of both poolings.

`test_resnet` at stride 8 on `datasets.DigitScenes`: the paper's protocol in minutes on a laptop. Training is timm's
task, optimiser, scheduler and loader; the comparison is `evaluate.evaluate`.
"""

from __future__ import annotations

import json
import logging
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from torch import nn
from tqdm import tqdm

from .._utils.files import counted, make_folder, move_files
from ..attach import POOLINGS, forward_both
from ..attribution.methods import TABLE_METHODS
from ..backbones.image_settings import image_loader
from ..datasets import DigitScenes
from ..evaluate import evaluate
from ..evaluation.report import Report
from ..hub import save_stream
from ..hub.repository import write_repository
from ..hub.stream_file import write_safetensors
from ..version import __version__
from ..visualize import draw_grid, saliency_row, save

NUM_PICTURES = 4

_logger = logging.getLogger(__name__)


@dataclass
class DemoSettings:
    """Sizes of the demo; `quick` ones show that it runs, not what it can do.

    Attributes:
        train_images: Training images, from scans that no validation image shows.
        validation_images: Images that accuracy is measured on.
        explained_images: The first of them, on which saliency is measured.
        gap_epochs: Epochs of the GAP network.
        stream_epochs: Epochs of the stream beside the frozen network.
        batch_size: Images at a time.
        lr: Learning rate at the start.
        weight_decay: AdamW's.
    """

    train_images: int = 8000
    validation_images: int = 2000
    explained_images: int = 400
    gap_epochs: int = 8
    stream_epochs: int = 2
    batch_size: int = 64
    lr: float = 4e-3
    weight_decay: float = 0.05


QUICK = DemoSettings(train_images=512, validation_images=64, explained_images=16, gap_epochs=1, stream_epochs=1)


def run(output_dir: str | Path, seed: int = 0, settings: DemoSettings | None = None) -> Report:
    """Makes the data, trains both networks, compares their saliency and writes the report.

    Args:
        output_dir: Gets `report.md`, `metrics.json`, `figure.png`, the per-image values `images.csv` and the weights,
            `model/` (a folder that `local-dir:` loads), `stream.safetensors` and `gap.safetensors`. They appear
            together at the end; an interrupted demo leaves nothing.
        seed: Of the data, the weights and the order of training. The same seed gives the same values.
        settings: Sizes, `QUICK` for a look.

    Returns:
        The report of the interpretability protocol.
    """
    settings = settings or DemoSettings()
    start = time.monotonic()
    timm.utils.random_seed(seed)
    _logger.info('Making %d training and %d validation images', settings.train_images, settings.validation_images)
    training = DigitScenes('train', settings.train_images, seed=seed)
    validation = DigitScenes('validation', settings.validation_images, seed=seed)
    explained = DigitScenes('validation', settings.explained_images, seed=seed)

    output = make_folder(output_dir)
    with tempfile.TemporaryDirectory(dir=output, prefix='.unfinished-') as scratch:
        folder = Path(scratch)
        gap_network = create_network('test_resnet')
        train(gap_network, training, settings.gap_epochs, settings, 'GAP network')
        gap_weights = folder / 'gap.safetensors'
        write_safetensors(gap_weights, gap_network.state_dict(), {})
        model = create_network('test_resnet_castream', freeze_backbone=True, backbone_checkpoint=str(gap_weights))
        train(model, training, settings.stream_epochs, settings, 'CA-Stream')
        model.eval()
        save_stream(model, folder / 'stream.safetensors')

        report = evaluate(
            model,
            image_loader(model, explained, settings.batch_size),
            TABLE_METHODS,
            POOLINGS,
            seed=seed,
            progress=True,
        )
        facts: dict[str, Any] = {
            'seed': seed,
            'settings': asdict(settings),
            'accuracy': measure_accuracy(model, validation, settings.batch_size),
            'saliency_in_box': saliency_in_box(model, explained, settings.batch_size, seed),
            'evaluation': report.to_dict(),
        }
        (folder / 'metrics.json').write_text(json.dumps(facts, indent=2) + '\n', encoding='utf-8')
        with open(folder / 'images.csv', 'w', encoding='utf-8') as csv_file:
            report.values.write_csv(csv_file)
        images = next(iter(image_loader(model, explained, NUM_PICTURES)))[0]
        rows = [saliency_row(model, x, ('attention', 'grad_cam')) for x in images.split(1)]
        save(draw_grid(rows), folder / 'figure.png')
        write_repository(
            model, folder / 'model', 'your-name/castream-demo', metrics=facts['evaluation'], dataset='digits'
        )
        minutes = (time.monotonic() - start) / 60
        (folder / 'report.md').write_text(_report_text(report, facts, output, minutes), encoding='utf-8')
        move_files(folder, output)
    return report


def create_network(name: str, **kwargs: Any) -> nn.Module:
    """A network of the demo, at stride 8: 64 x 64 pixels give 8 x 8 locations."""
    return timm.create_model(
        name,
        num_classes=len(DigitScenes.classes),
        output_stride=8,
        pretrained_cfg_overlay={
            'input_size': (3, 64, 64),
            'test_input_size': None,
            'crop_pct': 1.0,
            'pool_size': (8, 8),
            'num_classes': 10,
        },
        **kwargs,
    )


def train(model: nn.Module, dataset: DigitScenes, epochs: int, settings: DemoSettings, name: str) -> None:
    """Trains the parameters that require gradients: AdamW, and a cosine from the learning rate to 0 over all updates.

    Args:
        model: A timm model. It is left in training mode.
        dataset: The training images.
        epochs: Epochs.
        settings: `batch_size`, `lr` and `weight_decay` are read.
        name: Name of the network in the progress bar.
    """
    loader = image_loader(model, dataset, settings.batch_size, is_training=True, no_aug=True)
    task = ClassificationTask(model, nn.CrossEntropyLoss(), device=torch.device('cpu'), verbose=False)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=settings.lr, weight_decay=settings.weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=epochs, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    task.train()
    with tqdm(total=epochs * len(loader), desc=f'training the {name}', unit='batch') as bar:
        for update in range(epochs * len(loader)):
            if update % len(loader) == 0:
                batches = iter(loader)
            loss = task(*next(batches))['loss']
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step_update(update + 1)
            bar.set_postfix(epoch=update // len(loader) + 1, loss=f'{loss.item():.3f}', refresh=False)
            bar.update()


@torch.no_grad()
def measure_accuracy(model: nn.Module, dataset: DigitScenes, batch_size: int) -> dict[str, float]:
    """Top-1 accuracy of both poolings, from one pass.

    Args:
        model: A model with a stream, in evaluation mode.
        dataset: The images.
        batch_size: Images at a time.

    Returns:
        {pooling: percent}.

    Raises:
        ValueError: If the model has no stream.
    """
    hits = dict.fromkeys(POOLINGS, 0)
    for x, target in image_loader(model, dataset, batch_size):
        for pooling, logits in forward_both(model, x).items():
            hits[pooling] += int((logits.argmax(1) == target).sum())
    return {pooling: 100 * count / len(dataset) for pooling, count in hits.items()}


def saliency_in_box(model: nn.Module, scenes: DigitScenes, batch_size: int, seed: int) -> dict[str, float]:
    """The energy pointing game of the digits' boxes. The method `centre` is a baseline.

    Args:
        model: A model with a stream.
        scenes: The images, with their boxes.
        batch_size: Images at a time.
        seed: Of the intervals.

    Returns:
        {`method/pooling`: percent}.

    Raises:
        ValueError: If the model has no stream.
    """
    report = evaluate(
        model,
        image_loader(model, scenes, batch_size),
        ('attention', 'grad_cam', 'centre'),
        POOLINGS,
        metrics=('energy_pointing_game',),
        seed=seed,
    )
    return {
        f'{method}/{pooling}': report[pooling, method, 'energy_pointing_game'].value
        for method in report.methods
        for pooling in POOLINGS
    }


def _report_text(report: Report, facts: dict[str, Any], output: Path, minutes: float) -> str:
    accuracy, shares, settings = facts['accuracy'], facts['saliency_in_box'], facts['settings']
    quick = ' --quick' if settings == asdict(QUICK) else ''
    threads = counted(torch.get_num_threads(), 'thread')
    return f"""# CA-Stream and global average pooling on handwritten digits

`castream demo --train --seed {facts['seed']}{quick}`: {minutes:.1f} minutes with {threads} on
{platform.machine()}, torch {torch.__version__}, timm {timm.__version__}, timm_castream {__version__}.

A `test_resnet` was trained on {settings['train_images']} images of digits on photographs, 64 x 64 pixels, for
{settings['gap_epochs']} epochs; then, with all of it frozen, its CA-Stream for {settings['stream_epochs']}. No
validation image shows a digit that training saw.

![input, attention of each stage, Grad-CAM](figure.png)

## Accuracy, {settings['validation_images']} validation images

| GAP | CA |
| --- | --- |
| {accuracy['gap']:.2f} % | {accuracy['ca']:.2f} % |

## Interpretability, the first {settings['explained_images']} of them, class: the truth

```
{report}
```

The difference CA - GAP decides, paired by image. It counts where its 95 % interval excludes 0:

```
{report.summary()}
```

AD: the share of the probability that is lost when the saliency map masks the image. AG and AI: the share of the missing
probability that is gained, and how often. I and D: the mean probability while the most salient pixels are put into a
blurred image, and taken out of the image.

## Share of the saliency inside the digit's box

| map | share |
| --- | --- |
| Grad-CAM, GAP | {shares['grad_cam/gap']:.1f} % |
| Grad-CAM, CA | {shares['grad_cam/ca']:.1f} % |
| raw attention of the last stage | {shares['attention/ca']:.1f} % |
| a Gaussian in the middle | {shares['centre/ca']:.1f} % |

## Weights

- `model/`: the whole network, `timm.create_model('local-dir:{output}/model', pretrained=True)`
- `stream.safetensors`: the stream alone, for `timm_castream.load_stream`
- `gap.safetensors`: the network before it got its stream
"""
