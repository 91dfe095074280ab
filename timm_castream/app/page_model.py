"""A model opened for a page: the network under explanation, its name, and a sentence on its weights."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attribution.methods import METHODS
from ..attribution.peers import peers_that_fit
from ..attribution.user_methods import resolve_methods
from ..hub.load import DEFAULT_MODEL, open_model
from ..inference.engine import TORCH, can_try, check_engine, make_engine
from ..inference.predictor import Predictor
from ..visualize import class_name


@dataclass(eq=False)
class PageModel:
    """A network and the words for it.

    Attributes:
        predictor: The network, in evaluation mode. Without a stream it has one pooling, `'gap'`, which is its own. Its
            `logits` run in an engine as soon as `accelerate` has made one.
        name: Name of the architecture.
        weights: Where the weights come from, a sentence.
        engine: What runs the forwards of masked images, a name of `inference.engine.ENGINES`.
    """

    predictor: Predictor
    name: str
    weights: str
    engine: str = TORCH

    def __post_init__(self) -> None:
        self._export: threading.Thread | None = None

    def accelerate(self, x: Tensor) -> threading.Thread | None:
        """Begins to make the engine, in the background and once. Until it is there the forwards run in torch.

        An export takes as long as hundreds of forwards: call it before work that masks images many times.

        Args:
            x: (1, channels, H, W), an image to try the engine on.

        Returns:
            The thread that makes it, or None where the forwards stay in torch.
        """
        wanted = can_try(self.predictor) if self.engine == 'auto' else self.engine != TORCH
        if wanted and self._export is None:
            self._export = threading.Thread(target=self._make_engine, args=(x,), name='castream-export', daemon=True)
            self._export.start()
        return self._export

    def _make_engine(self, x: Tensor) -> None:
        # A copy: the hooks of an explanation that runs meanwhile would see the forwards of the trial.
        model = copy.deepcopy(self.predictor.model)
        predictor = Predictor(model, self.predictor.poolings, activation=self.predictor.activation)
        engine = make_engine(predictor, x, self.name, must_be_faster=self.engine == 'auto')
        self.predictor = self.predictor.accelerated(engine)

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
    engine: str = 'auto',
    **kwargs: Any,
) -> PageModel:
    """Opens a model.

    Args:
        name: Of the model, as `hub.load.open_model` takes it. None: `DEFAULT_MODEL` with its published weights.
        checkpoint, pretrained, kwargs: As of `hub.load.open_model`.
        activation: `'softmax'`, or `'sigmoid'` for multi-label models.
        device: Device of the model.
        engine: What runs the forwards of masked images, as of `evaluate`: `'auto'`, `'torch'` or `'onnxruntime'`.

    Raises:
        ValueError: If the model has no classes, a checkpoint is named without a model, or the engine cannot run the
            network.
        ModuleNotFoundError: If the engine is not installed.
        Exception: Those of `hub.load.open_model`.
    """
    model: Any = open_model(name, checkpoint, pretrained, **kwargs)
    name = name or DEFAULT_MODEL
    weights = _weights_sentence(checkpoint, pretrained or name == DEFAULT_MODEL, kwargs.get('backbone_checkpoint'))
    if not model.num_classes:
        raise ValueError(f'{name} has no classes, so there is no class to explain.')
    title = (model.pretrained_cfg or {}).get('architecture') or name
    predictor = Predictor(model.to(device).eval(), activation=activation)
    check_engine(engine, predictor)
    return PageModel(predictor, str(title), weights, engine)


def _weights_sentence(checkpoint: str | None, pretrained: bool, backbone_checkpoint: str | None) -> str:
    if checkpoint is not None:
        return f'Its weights are those of {Path(checkpoint).name if Path(checkpoint).is_file() else checkpoint}.'
    if backbone_checkpoint:
        return f'Its backbone has the weights of {Path(backbone_checkpoint).name}. Its stream is not trained yet.'
    if pretrained:
        return 'It has its published weights.'
    return 'Its weights are random, because no checkpoint was named: the maps mean nothing.'
