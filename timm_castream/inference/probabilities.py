"""Probabilities from logits, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = ('softmax', 'sigmoid')


def probabilities(logits: Tensor, activation: str = 'softmax', temperature: float = 1.0) -> Tensor:
    """Probabilities of logits. A softmax in float32 rounds to 1 whatever is nearer to it than 6e-8, and hides gains.

    Args:
        logits: (..., C).
        activation: `'softmax'`, or `'sigmoid'` for multi-label models.
        temperature: Positive number that divides the logits (arXiv 1706.04599).

    Returns:
        (..., C) in [0, 1], in float64; in float32 on a device without it.
    """
    logits = at_least_float32(logits) if logits.device.type == 'mps' else logits.double()
    if temperature != 1:
        logits = logits / temperature
    return logits.softmax(-1) if activation == 'softmax' else logits.sigmoid()


def at_least_float32(value: Tensor) -> Tensor:
    """The tensor in float32, or in its own type where that is wider."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
