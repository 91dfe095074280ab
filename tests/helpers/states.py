"""Models to compare, their state dicts, and repositories that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save
from torch import Tensor, nn

import timm_castream  # noqa: F401 registers the models

if TYPE_CHECKING:
    from hub_server import Hub


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


def publish_weights(hub: Hub, repo_id: str, model: Any, **config: Any) -> None:
    """Puts a whole model on the Hub without our own code."""
    hub.add(
        repo_id,
        model__safetensors=save(model.state_dict()),
        config__json=json.dumps(
            {
                'architecture': 'test_resnet_castream',
                'num_classes': model.num_classes,
                'pretrained_cfg': {
                    'input_size': [3, 160, 160],
                    'first_conv': 'conv1.0',
                    'classifier': 'fc',
                    'hf_hub_filename': 'model.safetensors',
                },
                **config,
            }
        ).encode(),
    )


def cached_files() -> list[Path]:
    """The files of the Hub client's cache."""
    return [path for path in Path(constants.HF_HUB_CACHE).glob('models--*/blobs/*')]


def make_file(path: Path, content: str = 'x = 1') -> Path:
    """Writes a text file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path
