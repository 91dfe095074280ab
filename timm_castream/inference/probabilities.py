"""Probabilities from logits, always in float32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = ('softmax', 'sigmoid')


def probabilities(logits: Tensor, activation: str = 'softmax', temperature: float = 1.0) -> Tensor:
    """Probabilities of logits. A softmax in half precision would round probabilities near 1 to 1.

    Args:
        logits: (..., C).
        activation: `'softmax'`, or `'sigmoid'` for multi-label models.
        temperature: Positive number that divides the logits (arXiv 1706.04599).

    Returns:
        (..., C) in [0, 1], in float32 or wider.
    """
    logits = at_least_float32(logits)
    if temperature != 1:
        logits = logits / temperature
    return logits.softmax(-1) if activation == 'softmax' else logits.sigmoid()


def at_least_float32(value: Tensor) -> Tensor:
    """The tensor in float32, or in its own type where that is wider."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
