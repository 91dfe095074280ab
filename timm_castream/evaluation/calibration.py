"""Temperature scaling (Guo et al., arXiv 1706.04599): one number that calibrates the confidence of a classifier."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional as F

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
