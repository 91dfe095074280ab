"""Models to compare, and their state dicts."""
from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

import timm_castream  # noqa: F401 registers the models


def make_model(name: str = 'test_resnet_castream', seed: int = 0, **kwargs: Any) -> Any:
    """A freshly drawn model: one seed, one set of weights."""
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def stream_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the stream's part of the state dict."""
    return {key: value for key, value in snapshot(model).items() if key.startswith('castream.')}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
