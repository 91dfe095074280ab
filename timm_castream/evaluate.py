"""The interpretability protocol over a data set, on one device or many, with finished batches kept on disk.

Work is split into fixed batches. Results therefore do not depend on the number of processes or on interruptions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ._utils.checks import ChannelNumbers, channel_numbers
from .attribution.method_hash import architecture
from .attribution.methods import DEFAULT_METHODS
from .attribution.user_methods import UserMethod, check_maps, resolve_methods
from .backbones.probe import eval_mode
from .backbones.stream_config import inference_args
from .evaluation.calibration import temperatures
from .evaluation.distributed import Processes
from .evaluation.image_source import ImageBatch, ImageSource
from .evaluation.loaders import warn_of_another_normalisation, warn_of_sampler
from .evaluation.plan import Plan
from .evaluation.protocol import Protocol
from .evaluation.report import Report
from .evaluation.resume import check_settings, is_finished, recorded_engine
from .evaluation.run import Run
from .evaluation.values import ImageValues
from .hub.label_names import label_names
from .hub.stream_file import backbone_name, weights_hash
from .inference.engine import TORCH, WORTH_AN_EXPORT, Engine, can_try, check_engine, make_engine
from .inference.predictor import Predictor, default_poolings
from .metrics.table import DEFAULT_METRICS
from .version import __version__

# An evaluation of fewer forwards of 224 x 224 pixels is not announced; a longer one is, if it takes so many minutes.
_MANY_FORWARDS = 5000
_MANY_MINUTES = 10
_logger = logging.getLogger(__name__)

OnBatch = Callable[[int, dict[str, float]], Any]


def evaluate(
    model: nn.Module,
    loader: Any,
    methods: Sequence[str] | Mapping[str, UserMethod] = DEFAULT_METHODS,
    poolings: Sequence[str] | None = None,
    target: str = 'truth',
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    setting: str = 'paper',
    curve_value: ChannelNumbers = 0.5,
    layer: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    torchcompile: bool = False,
    mean: ChannelNumbers | None = None,
    std: ChannelNumbers | None = None,
    temperature: str | Mapping[str, float] | None = None,
    keep_curves: bool = False,
    output_dir: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
    engine: str = 'auto',
    progress: bool = False,
    on_batch: OnBatch | None = None,
) -> Report:
    """Evaluates the saliency of a network, as the paper's tables do.

    Under torch.distributed every process evaluates a part of the images and gets the whole report. Targets of the data
    set that are (C,) vectors make it multi-label: sigmoid in softmax's place, one evaluation a positive label, mean
    average precision in accuracy's place. Negative entries of such a vector do not count.

    Unreadable images are left out of all results; the report names them.

    Args:
        model: A model with a stream, any timm model, or any module that gives (B, C) logits, on the device to run on.
        loader: A `DataLoader` or one of timm's `create_loader`, of images normalised as the model's `pretrained_cfg`
            says. A warning appears if the loader normalises otherwise. Images are read in order; the sampler is
            ignored. An item is (image, label), a mapping with `pixel_values` or `image` and
            `labels` or `label`, or, where no label is needed, an image alone.
        methods: Names of `methods.METHODS` or of other libraries, such as `'captum:IntegratedGradients,n_steps=50'`, or
            a mapping from a label to a name, a callable or an array. A callable gets (x, target), (B, 3, H, W) images
            and (B,) class indices, and returns (B, h, w), (B, 1, h, w) or (B, C, H, W), whose channels are summed. It runs with gradients, once under each pooling, with the model
            switched to it. An array has the maps of all images in the order of the data set, (N, h, w);
            `{pooling: array}` gives each pooling its own. Maps are clamped at 0 and scaled by their own minimum and
            maximum.
        poolings: `'gap'`, `'ca'` or both. None: both for a model with a stream, `'gap'` for others: their own forward.
        target: The class explained: `'truth'`, the label, or `'predicted'`, under each pooling its own prediction. The
            metrics of boxes then count the images whose predictions have a box under both poolings. A function gets the
            output for one image, (C,), and gives one number in [0, 1] that takes the place of the probability.
        metrics: Names of `metrics.METRICS`. Only what they need is computed. Those of localisation need a data set
            with boxes.
        setting: Insertion and Deletion as in `metrics.CURVE_SETTINGS`: `'paper'` or `'rise'`.
        curve_value: Colour from which `insertion_value` starts and in which `deletion_value` ends: a number in [0, 1],
            0 for black, or one per channel.
        layer: Another module than the pooled stage for the CAM methods.
        num_samples: Evaluate so many images of the data set, drawn by `seed`.
        seed: Seed of the subset, of methods and metrics that draw random numbers, and of the resamples behind the
            intervals.
        batch_size: Images of one forward. It never shows in the result. None: as many as suit the device.
        amp_dtype: Run the network under autocast to this type; probabilities are always float32.
        channels_last: Run the network in this memory format.
        torchcompile: Compile the network.
        mean, std: Normalisation of the images, for a model without `pretrained_cfg`.
        temperature: `'fit'` fits one temperature a pooling to images outside the sample (arXiv 1706.04599) and
            measures with it; `{pooling: temperature}` gives them. None: 1.
        keep_curves: Keep the curves of Insertion and Deletion for pictures.
        output_dir: Folder for finished batches, and in the end for `table.csv`, `evaluation.json` and `images.csv`. An
            interrupted evaluation resumes from there.
        arguments: More to keep in `evaluation.json`, plain data such as the data set's name. An interrupted evaluation
            resumes only if these are equal.
        engine: What runs the forwards of masked and perturbed images: `'torch'`, `'onnxruntime'`, or `'auto'`, which
            takes ONNX Runtime on a CPU if it is installed (`pip install "timm_castream[fast]"`), the network exports, a
            batch is faster in it and the evaluation is long. The values agree to 1e-5 of probability. An interrupted
            evaluation resumes with its own engine.
        progress: Show a progress bar.
        on_batch: Called after each batch of this process with the number of its images that are done and the mean of
            every column of images.csv over the batch, plain numbers by name: for TensorBoard, `lambda done, means:
            [writer.add_scalar(name, value, done) for name, value in means.items()]`.

    Returns:
        The report; `print` it, or read `report['ca', 'score_cam', 'average_drop']`.

    Raises:
        ValueError: If an argument or a label does not fit, `output_dir` holds another evaluation or another run writes
            to it, or the processes have different weights.
    """
    plan = Plan(
        methods=resolve_methods(methods),
        poolings=default_poolings(model) if poolings is None else poolings,
        metrics=metrics,
        target=target,
        setting=setting,
        curve_value=curve_value,
        layer=layer,
        num_samples=num_samples,
        seed=seed,
        amp_dtype=amp_dtype,
        temperature=temperature,
    )
    source = ImageSource(loader, num_samples, seed, needs_labels=target == 'truth' or temperature == 'fit')
    predictor = Predictor(
        model,
        plan.poolings,
        layer=layer,
        activation='sigmoid' if source.is_multilabel else 'softmax',
        batch_size=batch_size,
        channels_last=channels_last,
        torchcompile=torchcompile,
        mean=mean,
        std=std,
        score=target if callable(target) else None,
    )
    check_engine(engine, predictor, amp_dtype)
    num_classes = _num_classes(predictor, source)
    with predictor.alone():
        _check(plan, source, predictor, num_classes)
    processes = Processes.current()
    settings = {**(arguments or {}), **_settings(predictor, source), **source.settings(), **plan.settings()}
    if any(callable(method.source) for method in plan.methods):  # a function may depend on the images of its batch
        settings['images_at_a_time'] = max(map(len, source.batches))
    processes.check_same_weights(settings['weights'])
    warn_of_another_normalisation(loader, settings['mean'], settings['std'])
    warn_of_sampler(loader, any('saved maps' in method.needs for method in plan.methods), num_samples)
    if output_dir is not None:
        processes.on_main(lambda: check_settings(output_dir, settings, but=('engine',)))  # before an export
    recorded = processes.on_main(lambda: recorded_engine(output_dir))
    is_done = processes.on_main(lambda: is_finished(output_dir, source.indices))
    if engine == 'auto' and recorded:
        engine = recorded.partition(' ')[0]
    if is_done and engine == recorded.partition(' ')[0]:
        settings['engine'] = recorded
    else:
        check_engine(engine, predictor, amp_dtype)
        predictor, settings['engine'] = _accelerated(engine, predictor, plan, source, settings, processes)

    device = predictor.device
    autocast = torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None)
    if processes.rank == 0 and not is_done:
        with autocast:
            _announce(predictor, plan, source, processes.count)
    with Run(settings, source.batches, output_dir, keep_curves, processes) as run, autocast:
        fitted = processes.on_main(lambda: temperatures(temperature, predictor, source, seed, run.temperatures_path))
        predictor = predictor.calibrated(fitted)
        protocol = Protocol(
            predictor, plan, num_classes=num_classes, is_multilabel=source.is_multilabel, keep_curves=keep_curves
        )
        done = 0
        with eval_mode(predictor.model):
            for batch in _with_progress(source, run, processes, progress):
                run.lose({item.name: item.reason for item in batch.unreadable})
                if not batch.indices:
                    continue
                x, labels = batch.images.to(device), batch.labels.to(device)
                with predictor.alone():  # and not while images are read: a data set may use the network too
                    values = protocol.measure(batch.indices, x, labels, _find_boxes(source, batch.indices))
                run.keep(values)
                done += len(batch.indices)
                if on_batch is not None:
                    on_batch(done, values.means())
        values = run.values()
        _check_values(plan, values)
        if fitted:
            settings['temperatures'] = fitted
        versions = {'torch': torch.__version__, 'timm': timm.__version__, 'timm_castream': __version__}
        report = Report.from_values(
            network=f'{backbone_name(model)}_castream' if predictor.has_stream else backbone_name(model),
            poolings=plan.poolings,
            methods=[method.name for method in plan.methods],
            metrics=plan.metrics,
            values=values,
            seed=seed,
            settings=settings | {'seed': seed, 'versions': versions},
            unreadable=run.unreadable(),
            files={index: source.name(index) for index in source.indices},
            label_names=label_names(predictor.backbone),
            pooling_names=predictor.pooling_names,
        )
        if output_dir is not None and processes.rank == 0:
            report.save(output_dir)
    return report


def _num_classes(predictor: Predictor, source: ImageSource) -> int:
    """C, of a model without `num_classes` from the logits of one image."""
    if predictor.num_classes == 0:
        raise ValueError(f'{predictor.name} gives no class scores: its num_classes is 0.')
    if predictor.num_classes:
        return predictor.num_classes
    batch = next(batch for batch in source.read([indices[:1] for indices in source.batches]) if batch.indices)
    with predictor.evaluating():
        logits = predictor.forward(batch.images.to(predictor.device))
    if logits.ndim != 2:
        raise ValueError(
            f'{predictor.name} gives {tuple(logits.shape)} for one image, an evaluation needs (1, C) logits.'
        )
    return logits.shape[1]


def _check(plan: Plan, source: ImageSource, predictor: Predictor, num_classes: int) -> None:
    """Raises ValueError unless the data set and the network have what the plan needs."""
    check_maps(plan.methods, len(source.dataset), plan.poolings)
    if plan.metric_of_boxes and not source.has_boxes:
        raise ValueError(
            f'metric {plan.metric_of_boxes!r} needs boxes, which the data set lacks: set dataset.boxes with '
            'timm_castream.datasets.read_boxes.'
        )
    if plan.temperature == 'fit' and not source.outside:
        raise ValueError(
            f"temperature='fit' needs images outside the sample: choose num_samples below {len(source.dataset)}."
        )
    if not callable(plan.target):
        source.check_classes(predictor.backbone, num_classes, plan.target)
    channel_numbers('curve_value', plan.curve_value, source.input_size[0])
    predictor.check_needs(plan.methods, torch.zeros(1, *source.input_size, device=predictor.device))


def _settings(predictor: Predictor, source: ImageSource) -> dict[str, Any]:
    """What a folder of an unfinished evaluation must agree on about the network, plain data."""
    blank = torch.zeros(1, *source.input_size, device=predictor.device)
    mean, std = ([round(v, 6) for v in values.flatten().tolist()] for values in predictor.normalisation(blank))
    return {
        'weights': weights_hash(predictor.model),
        'architecture': architecture(predictor.inner),
        'stream': inference_args(predictor.backbone.castream_config) if predictor.has_stream else None,
        'mean': mean,
        'std': std,
    }


def _accelerated(
    engine: str, predictor: Predictor, plan: Plan, source: ImageSource, settings: dict[str, Any], processes: Processes
) -> tuple[Predictor, str]:
    """The network with its engine, and the name of the engine. The first process decides for all."""
    auto = engine == 'auto'
    is_long = plan.num_forwards(predictor, source.input_size) * len(source.indices) >= WORTH_AN_EXPORT
    wanted = is_long and can_try(predictor, plan.amp_dtype) if auto else engine != TORCH
    made: list[Engine] = []

    def make(must_be_faster: bool) -> str:
        if not wanted:
            return TORCH
        images = source.some_images(4).to(predictor.device)
        fingerprint = f'{settings["weights"]} {settings["architecture"]}'
        found = make_engine(predictor, images, fingerprint, must_be_faster)
        made.extend([found] if found else ())
        return found.name if found else TORCH

    name = processes.on_main(lambda: make(must_be_faster=auto))
    if name != TORCH and not made and make(must_be_faster=False) != name:
        raise RuntimeError(f'{name} runs in the first process alone: install it on all machines, or pass engine=torch.')
    return (predictor.accelerated(made[0]) if name != TORCH else predictor), name


def _announce(predictor: Predictor, plan: Plan, source: ImageSource, num_processes: int) -> None:
    """Says how long a long evaluation will take, and what costs it, from the time of one batch."""
    height, width = source.input_size[-2:]
    size = height * width / 224**2
    per_image = plan.num_forwards(predictor, source.input_size)
    of_libraries = size * plan.num_forwards_of_libraries(predictor)
    if (per_image + of_libraries) * len(source.indices) < _MANY_FORWARDS:
        return
    blank = torch.zeros(1, *source.input_size, device=predictor.device)
    batch = blank.repeat(predictor.batch_size(blank), 1, 1, 1)

    def seconds(forward: Callable[[Tensor], dict[str, Tensor]]) -> float:
        """Of a forward of one image of 224 x 224 pixels."""
        with predictor.evaluating():
            forward(batch)
            start = time.perf_counter()
            forward(batch)[plan.poolings[0]].sum().item()  # waits for a GPU
        return (time.perf_counter() - start) / len(batch) / size

    of_score_cam = size * plan.num_score_cam_forwards(predictor)
    second = seconds(predictor.logits)
    parts = {
        'Score-CAM': of_score_cam * second,
        # Other libraries know no engine.
        'methods of other libraries': of_libraries * seconds(predictor.torch_logits) if of_libraries else 0,
    }
    whole = per_image * second + parts['methods of other libraries']
    minutes = whole * len(source.indices) / num_processes / 60
    if minutes < _MANY_MINUTES:
        return
    costs = [f'{part / whole:.0%} of it for {name}' for name, part in parts.items() if part]
    _logger.info('The evaluation will take about %.0f minutes%s.', minutes, ''.join(f', {cost}' for cost in costs))


def _find_boxes(source: ImageSource, indices: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda position, classes: source.boxes([indices[i] for i in position.tolist()], classes)


def _with_progress(source: ImageSource, run: Run, processes: Processes, show: bool) -> Iterator[ImageBatch]:
    """The batches that are left, under a progress bar that counts what is done."""
    remaining = run.remaining()
    bar = tqdm(
        desc='evaluate' if processes.count == 1 else f'evaluate, process 1 of {processes.count}',
        total=sum(map(len, remaining)),
        unit='image',
        disable=not show or processes.rank > 0,
    )
    with bar:
        for batch in source.read(remaining):
            yield batch
            bar.update(len(batch.indices) + len(batch.unreadable))


def _check_values(plan: Plan, values: ImageValues) -> None:
    if not len(values.pairs['image']):
        raise ValueError('No image has a positive label, so there is no class to explain.')
    if plan.metric_of_boxes and not values.has_box(plan.poolings).any():
        both = ' under both poolings' if len(plan.poolings) > 1 else ''
        raise ValueError(
            f'metric {plan.metric_of_boxes!r} has no value: no image has a box of its class inside the input{both}.'
        )
