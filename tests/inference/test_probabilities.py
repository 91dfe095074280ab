"""Probabilities of logits."""

from __future__ import annotations

import torch

from timm_castream.inference.probabilities import probabilities


def test_probabilities_of_half_precision_logits_are_those_of_float32() -> None:
    logits = torch.tensor([[9.0, 0.0, 1.0]], dtype=torch.bfloat16)
    assert torch.equal(probabilities(logits), logits.float().softmax(1))
    assert 0.999 < probabilities(logits)[0, 0] < 1
    assert probabilities(logits.double(), 'sigmoid').dtype == torch.float64


def test_a_temperature_divides_the_logits() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0]])
    assert torch.equal(probabilities(logits, temperature=2.0), (logits / 2).softmax(1))
    assert torch.equal(probabilities(logits, 'sigmoid', 2.0), (logits / 2).sigmoid())
