"""Temperature scaling (Guo et al., arXiv 1706.04599): one number that calibrates the confidence of a classifier."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .._utils.files import write_whole
from ..backbones.probe import eval_mode
from ..inference.predictor import Predictor
from .image_source import ImageSource

_MAX_IMAGES = 2000
_BATCH_SIZE = 64
_PLAUSIBLE = (0.05, 20.0)
_logger = logging.getLogger(__name__)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T that minimises the cross entropy of logits / T.

    Args:
        logits: (N, C).
        labels: (N,) class indices, or (N, C) multi-label targets: 1, 0, or negative where a class does not count.

    Returns:
        T, a positive number. The classes predicted stay the same.
    """
    logits, labels = logits.detach().double(), labels.to(logits.device)
    log_temperature = torch.zeros((), dtype=torch.float64, device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, tolerance_grad=1e-9, line_search_fn='strong_wolfe')

    def loss() -> Tensor:
        scaled = logits / log_temperature.exp()
        if labels.ndim == 1:
            return F.cross_entropy(scaled, labels)
        counts = labels >= 0
        return F.binary_cross_entropy_with_logits(scaled[counts], labels[counts].double())

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.inference_mode(False), torch.enable_grad():
        optimizer.step(closure)
    temperature = float(log_temperature.detach().exp())
    if not _PLAUSIBLE[0] <= temperature <= _PLAUSIBLE[1]:
        _logger.warning(
            'The fitted temperature is %.3g on %d images: the network is hardly trained, or the images are too few.',
            temperature,
            len(logits),
        )
    return temperature


def temperatures(
    asked: str | Mapping[str, float] | None, predictor: Predictor, source: ImageSource, seed: int, path: Path | None
) -> dict[str, float]:
    """One temperature a pooling: as given, as an interrupted evaluation fitted them, or fitted to images outside.

    Args:
        asked: None for none, {pooling: temperature}, or `'fit'`.
        predictor: The network.
        source: The images; those outside the sample are fitted to, at most 2000 of them.
        seed: Seed of their choice.
        path: File of fitted temperatures, or None.

    Raises:
        ValueError: If the file is damaged, or no image outside the sample can be read.
    """
    if asked is None:
        return {}
    if isinstance(asked, Mapping):
        return {name: float(asked[name]) for name in predictor.poolings}
    if path is not None and path.is_file():
        try:
            return {name: float(json.loads(path.read_text(encoding='utf-8'))[name]) for name in predictor.poolings}
        except (KeyError, TypeError, ValueError):
            raise ValueError(f'{path} is damaged: delete it, or name another folder.') from None
    order = torch.randperm(len(source.outside), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = sorted(source.outside[i] for i in order[:_MAX_IMAGES])
    logits: dict[str, list[Tensor]] = {name: [] for name in predictor.poolings}
    labels: list[Tensor] = []
    with eval_mode(predictor.model):
        for batch in source.read([chosen[i : i + _BATCH_SIZE] for i in range(0, len(chosen), _BATCH_SIZE)]):
            if not batch.indices:
                continue
            labels.append(batch.labels.cpu())
            with predictor.alone():
                of_batch = predictor.all_logits(batch.images.to(predictor.device))
            for name, value in of_batch.items():
                logits[name].append(value.cpu())
    if not labels:
        raise ValueError('None of the images outside the sample can be read, so no temperature can be fitted.')
    fitted = {name: fit_temperature(torch.cat(value), torch.cat(labels)) for name, value in logits.items()}
    if path is not None:
        with write_whole(path) as file:
            json.dump(fitted, file)
    return fitted
