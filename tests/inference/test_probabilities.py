"""Probabilities of logits."""

from __future__ import annotations

import math

import pytest
import torch

from timm_castream.inference.probabilities import probabilities
from timm_castream.metrics import average_gain, average_increase


def test_probabilities_of_half_precision_logits_are_those_of_float64() -> None:
    logits = torch.tensor([[9.0, 0.0, 1.0]], dtype=torch.bfloat16)
    assert torch.equal(probabilities(logits), logits.double().softmax(1))
    assert 0.999 < probabilities(logits)[0, 0] < 1
    assert probabilities(logits.double(), 'sigmoid').dtype == torch.float64


def test_a_temperature_divides_the_logits() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0]])
    assert torch.equal(probabilities(logits, temperature=2.0), (logits.double() / 2).softmax(1))
    assert torch.equal(probabilities(logits, 'sigmoid', 2.0), (logits.double() / 2).sigmoid())


def test_probabilities_near_1_keep_their_distance_from_it() -> None:
    clean, masked = (probabilities(torch.tensor([[value, 0.0, 0.0]]))[:, 0] for value in (18.0, 25.0))
    exact = [2 * math.exp(-value) / (1 + 2 * math.exp(-value)) for value in (18, 25)]
    assert 1 - clean.item() == pytest.approx(exact[0], rel=1e-6)
    assert average_increase(clean, masked).item() == 100
    assert average_gain(clean, masked).item() == pytest.approx(100 * (1 - exact[1] / exact[0]), rel=1e-6)
