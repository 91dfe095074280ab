"""The side of `speed.py` that imports timm_castream: of this tree, or of an older one that stands first on the path.

It reads a task a line, JSON, and answers with one: it runs a job once and says how many seconds that took. A job is
made when it is asked for first. That is not timed.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import timm_castream
from timm_castream.attribution import attribute_all
from timm_castream.evaluate import evaluate

POOLINGS = ('gap', 'ca')
MASKED = ('average_drop', 'average_gain', 'average_increase')
CURVES = ('insertion', 'deletion')


def open_model(architecture: str, weights: str) -> Any:
    state_dict = load_file(weights)
    model = timm.create_model(f'{architecture}_castream', num_classes=num_classes(architecture, state_dict)).eval()
    model.load_state_dict(state_dict)
    return model


def num_classes(architecture: str, state_dict: Mapping[str, torch.Tensor]) -> int:
    """C, of the classifier in a state dict."""
    cfg: Any = timm.get_pretrained_cfg(architecture)
    return len(state_dict[f'{cfg.classifier}.weight'])


def takes_engine() -> bool:
    return 'engine' in evaluate.__kwdefaults__


def make_protocol(
    architecture: str,
    weights: str,
    images: str,
    count: int,
    methods: list[str],
    metrics: list[str],
    engine: str = 'onnxruntime',
) -> Callable[[], Any]:
    """`evaluate` of some images. The first call exports the network, where there is an engine."""
    model, x = open_model(architecture, weights), torch.from_numpy(np.load(images))[:count]
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), min(len(x), 16))
    options = {'engine': engine} if takes_engine() else {}

    def run() -> dict[str, float]:
        report = evaluate(model, loader, methods, POOLINGS, 'predicted', metrics=metrics, **options)
        keys = [(p, method, metric) for p in POOLINGS for method in methods for metric in metrics]
        return {'/'.join(key): report[key].value for key in keys}

    return run


def make_score_cam(architecture: str, weights: str, images: str, count: int) -> Callable[[], Any]:
    """Score-CAM's maps under both poolings, in the engine where there is one."""
    model, x = open_model(architecture, weights), torch.from_numpy(np.load(images))[:count]
    if not takes_engine():
        return lambda: attribute_all(model, x, ('score_cam',)) and None
    from timm_castream.attribution.saliency import saliency_maps
    from timm_castream.attribution.user_methods import resolve_methods
    from timm_castream.inference.engine import make_engine
    from timm_castream.inference.predictor import Predictor

    predictor = Predictor(model)
    predictor = predictor.accelerated(make_engine(predictor, x, architecture))

    def run() -> None:
        with predictor.evaluating():
            saliency_maps(predictor, x, resolve_methods(('score_cam',)))

    return run


def make_peer_score_cam(architecture: str, weights: str, images: str, count: int, layer: str) -> Callable[[], Any]:
    """Score-CAM of pytorch-grad-cam, once for each pooling."""
    from pytorch_grad_cam import ScoreCAM

    model, x = open_model(architecture, weights), torch.from_numpy(np.load(images))[:count]
    cam = ScoreCAM(model, [model.get_submodule(layer)])

    def run() -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            for pooling in POOLINGS:
                with timm_castream.pooling(model, pooling):
                    cam(x, None)

    return run


def make_curves(architecture: str, weights: str, images: str, count: int) -> Callable[[], Any]:
    """Insertion and Deletion of Grad-CAM's maps under GAP, which are made before."""
    model, x = open_model(architecture, weights), torch.from_numpy(np.load(images))[:count]
    maps = attribute_all(model, x, ('grad_cam',), poolings=('gap',))['gap', 'grad_cam'].numpy()
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), len(x))
    options = {'engine': 'onnxruntime'} if takes_engine() else {}
    return lambda: evaluate(model, loader, {'maps': maps}, ('gap',), 'predicted', metrics=CURVES, **options) and None


def make_peer_curves(architecture: str, weights: str, images: str, count: int, layer: str) -> Callable[[], Any]:
    """Insertion and Deletion of torch-cam, of its own Grad-CAM maps of the same layer, with as many steps."""
    from torchcam.methods import GradCAM
    from torchcam.metrics import DeletionInsertionMetric

    model, x = open_model(architecture, weights), torch.from_numpy(np.load(images))[:count]
    timm_castream.detach(model)
    extractor = GradCAM(model, layer)
    metric = DeletionInsertionMetric(
        extractor, lambda logits: logits.softmax(1), steps=-(-x.shape[2] // 8), batch_size=16
    )
    return lambda: metric.update(x)


def make_forward(architecture: str, weights: str, images: str, count: int) -> Callable[[], Any]:
    """Ten forwards with a stream."""
    model, x = open_model(architecture, weights), torch.from_numpy(np.load(images))[:count]

    def run() -> None:
        with torch.no_grad():
            for _ in range(10):
                model(x)

    return run


def make_step(architecture: str, weights: str, images: str, count: int) -> Callable[[], Any]:
    """Five training steps of a stream beside a frozen backbone."""
    model = timm_castream.freeze_backbone(open_model(architecture, weights)).train()
    x, target = torch.from_numpy(np.load(images))[:count], torch.zeros(count, dtype=torch.long)
    optimizer = torch.optim.SGD(model.castream.parameters(), lr=1e-4, momentum=0.9)

    def run() -> None:
        for _ in range(5):
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


MAKERS: dict[str, Callable[..., Callable[[], Any]]] = {
    'protocol': make_protocol,
    'score_cam': make_score_cam,
    'peer_score_cam': make_peer_score_cam,
    'curves': make_curves,
    'peer_curves': make_peer_curves,
    'forward': make_forward,
    'step': make_step,
}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    jobs: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        task = json.loads(line)
        key = json.dumps(task)
        if key not in jobs:
            jobs[key] = MAKERS[task.pop('job')](**task)
        start = time.perf_counter()
        result = jobs[key]()
        seconds = time.perf_counter() - start
        print(json.dumps({'seconds': seconds, 'result': result, 'peak_mb': peak_mb()}), file=answers, flush=True)


def peak_mb() -> float:
    """The most memory that this process had. getrusage would give that of the process which started it, if larger."""
    status = Path('/proc/self/status').read_text(encoding='utf-8')
    return int(re.findall(r'VmHWM:\s*(\d+) kB', status)[0]) / 1024


if __name__ == '__main__':
    main()
