"""A model opened for a page: the network under explanation, its name, and a sentence on its weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..attribution.methods import METHODS
from ..attribution.peers import peers_that_fit
from ..attribution.user_methods import resolve_methods
from ..hub.load import DEFAULT_MODEL, open_model
from ..inference.predictor import Predictor
from ..visualize import class_name


@dataclass(frozen=True)
class PageModel:
    """A network and the words for it.

    Attributes:
        predictor: The network, in evaluation mode. Without a stream it has one pooling, `'gap'`, which is its own.
        name: Name of the architecture.
        weights: Where the weights come from, a sentence.
    """

    predictor: Predictor
    name: str
    weights: str

    @property
    def model(self) -> Any:
        """The timm model inside its wrappers."""
        return self.predictor.backbone

    @property
    def pooling_names(self) -> dict[str, str]:
        """{pooling: its name}."""
        return self.predictor.pooling_names

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that fit the network."""
        return tuple(name for name, row in METHODS.items() if self.predictor.has_stream or 'stream' not in row.needs)

    @property
    def map_methods(self) -> tuple[str, ...]:
        """Names of the methods that explain: all but the baselines."""
        return tuple(name for name in self.methods if METHODS[name].needs & {'gradients', 'masked forwards', 'stream'})

    @cached_property
    def peer_methods(self) -> tuple[str, ...]:
        """Names of the methods of the installed libraries that fit the network."""
        return tuple(peers_that_fit(self.predictor))

    def class_name(self, index: int) -> str:
        """Name of a class."""
        return class_name(self.model, index)


def method_title(name: str) -> str:
    """Title of a built-in method or of one of another library."""
    return resolve_methods((name,))[0].title


def open_for_page(
    name: str | None = None,
    checkpoint: str | None = None,
    pretrained: bool = False,
    *,
    activation: str = 'softmax',
    device: str | torch.device = 'cpu',
    **kwargs: Any,
) -> PageModel:
    """Opens a model.

    Args:
        name: Of the model, as `hub.load.open_model` takes it. None: `DEFAULT_MODEL` with its published weights.
        checkpoint, pretrained, kwargs: As of `hub.load.open_model`.
        activation: `'softmax'`, or `'sigmoid'` for multi-label models.
        device: Device of the model.

    Raises:
        ValueError: If the model has no classes, or a checkpoint is named without a model.
        Exception: Those of `hub.load.open_model`.
    """
    model: Any = open_model(name, checkpoint, pretrained, **kwargs)
    name = name or DEFAULT_MODEL
    weights = _weights_sentence(checkpoint, pretrained or name == DEFAULT_MODEL, kwargs.get('backbone_checkpoint'))
    if not model.num_classes:
        raise ValueError(f'{name} has no classes, so there is no class to explain.')
    title = (model.pretrained_cfg or {}).get('architecture') or name
    return PageModel(Predictor(model.to(device).eval(), activation=activation), str(title), weights)


def _weights_sentence(checkpoint: str | None, pretrained: bool, backbone_checkpoint: str | None) -> str:
    if checkpoint is not None:
        return f'Its weights are those of {Path(checkpoint).name if Path(checkpoint).is_file() else checkpoint}.'
    if backbone_checkpoint:
        return f'Its backbone has the weights of {Path(backbone_checkpoint).name}. Its stream is not trained yet.'
    if pretrained:
        return 'It has its published weights.'
    return 'Its weights are random, because no checkpoint was named: the maps mean nothing.'
