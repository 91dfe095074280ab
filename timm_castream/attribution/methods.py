"""The table of attribution methods.

A method is a function from a batch and a pooling to saliency maps. The batch computes the quantities that methods share
once, when a method first asks for them.

Letters: B images, K targets an image, D channels and h x w locations of the layer, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..inference.predictor import Predictor
from . import cam
from .activations import Activations
from .method_hash import method_hash

SaliencyFunction = Callable[['Batch', str], Tensor]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: Key in Python, on the command line and in files.
        title: Name in tables and pictures.
        saliency: Maps of a batch under a pooling, (B, K, h, w) in [0, 1].
        needs: Of `'stream'`, `'feature maps'`, `'grid'`, `'gradients'`, `'masked forwards'`, `'seed'`, `'saved maps'`.
        in_paper: Whether the paper shows the method.
        forwards: Forwards in torch that one map takes by itself, roughly, or each of its channels.
        forward_a_channel: Whether the forwards are those of each channel.
        source: Name, callable or arrays behind a method of the user.
        check: Function that raises ValueError if the method cannot run on a network, before long work.
    """

    name: str
    title: str
    saliency: SaliencyFunction
    needs: frozenset[str] = frozenset()
    in_paper: bool = False
    forwards: int = 0
    forward_a_channel: bool = False
    source: Any = field(default=None, repr=False, compare=False)
    check: Callable[[Predictor], None] = field(default=lambda predictor: None, repr=False, compare=False)

    @property
    def source_hash(self) -> str:
        """Text that tells one method of the user from another, for the settings of an evaluation."""
        return '' if self.source is None else method_hash(self.source)


class Batch:
    """Images under explanation.

    Args:
        predictor: The network, in evaluation mode.
        x: (B, 3, H, W) normalised images.
        methods: The methods that will be asked for.
        indices: (B,) positions of the images in their data set. None: 0 to B - 1.
        seed: Seed of the method `random`.
    """

    def __init__(
        self, predictor: Predictor, x: Tensor, methods: Sequence[Method], indices: Tensor | None = None, seed: int = 0
    ) -> None:
        self.predictor = predictor
        self.x = x
        self.methods = tuple(methods)
        self.indices = torch.arange(len(x)) if indices is None else indices
        self.seed = seed
        self.targets: dict[str, Tensor] = {}  # {pooling: (B, K)}, set before the first method runs
        self._needs = frozenset().union(*(method.needs for method in methods))
        self._gradients: dict[str, Tensor] = {}

    @cached_property
    def activations(self) -> Activations:
        """The forward that gives feature maps, logits and attention."""
        return Activations(self.predictor, self.x, attention='stream' in self._needs)

    @cached_property
    def product_activations(self) -> Activations:
        """The activations behind the normalisation of a class-token network: its products with gradients are not zero."""
        layer = self.predictor.norm_layer
        return self.activations if layer is None else Activations(self.predictor.at_layer(layer), self.x)

    def forget_graph(self) -> None:
        """Computes the activations anew when they are next asked for."""
        for name in ('activations', 'product_activations'):
            vars(self).pop(name, None)
        self._gradients.clear()

    @cached_property
    def logits(self) -> dict[str, Tensor]:
        """{pooling: (B, C)} of the images, from the forward that gives the feature maps if a method reads them."""
        if 'feature maps' in self._needs or ('grid' in self._needs and self._has_grid):
            logits = {pooling: value.detach() for pooling, value in self.activations.logits.items()}
        else:
            logits = self.predictor.all_logits(self.x)
        self.predictor.check_scores(logits)
        return logits

    @cached_property
    def score_cam_weights(self) -> dict[str, Tensor]:
        """Score-CAM's w, {pooling: (B, K, D)}: one forward of a masked image serves all poolings."""
        predictor = self.predictor

        def predict(images: Tensor) -> dict[str, Tensor]:
            return {name: predictor.probabilities(logits, name) for name, logits in predictor.logits(images).items()}

        mean, std = predictor.normalisation(self.x)
        return cam.score_cam_weights(
            predict, self.x, self.activations.feature_maps, self.targets, mean, std, predictor.batches(self.x)
        )

    def gradients(self, pooling: str) -> Tensor:
        """Gradients of the logits of the targets with respect to the feature maps, (B, K, D, h, w)."""
        if pooling not in self._gradients:
            self._gradients[pooling] = self.activations.gradients(pooling, self.targets[pooling])
        return self._gradients[pooling]

    def expand_targets(self, maps: Tensor, pooling: str) -> Tensor:
        """(B, h, w) maps that depend on no target, as (B, K, h, w)."""
        return maps[:, None].expand(-1, self.targets[pooling].shape[1], -1, -1)

    @property
    def grid(self) -> tuple[int, ...]:
        """(h, w): the locations of the feature maps, or one location for 32 x 32 pixels where there are none."""
        if self._has_grid:
            return self.activations.feature_maps.shape[-2:]
        return tuple(max(1, side // 32) for side in self.x.shape[-2:])

    @cached_property
    def _has_grid(self) -> bool:
        if not self.predictor.has_feature_maps:
            return False
        try:
            return self.activations.feature_maps.ndim == 4
        except ValueError:  # a network that pools no feature map
            return False


def _attention(batch: Batch, pooling: str) -> Tensor:
    attention = batch.activations.attention
    assert attention is not None  # the method needs a stream, so the activations have it
    return batch.expand_targets(attention, pooling)


def _grad_cam(batch: Batch, pooling: str) -> Tensor:
    return cam.class_activation_map(batch.activations.feature_maps, cam.grad_cam_weights(batch.gradients(pooling)))


def _grad_cam_pp(batch: Batch, pooling: str) -> Tensor:
    maps = batch.activations.feature_maps
    return cam.class_activation_map(maps, cam.grad_cam_pp_weights(maps, batch.gradients(pooling)))


def _xgrad_cam(batch: Batch, pooling: str) -> Tensor:
    maps = batch.activations.feature_maps
    return cam.class_activation_map(maps, cam.xgrad_cam_weights(maps, batch.gradients(pooling)))


def _hires_cam(batch: Batch, pooling: str) -> Tensor:
    activations = batch.product_activations
    if activations is batch.activations:
        return cam.class_activation_map(activations.feature_maps, batch.gradients(pooling))
    return cam.class_activation_map(activations.feature_maps, activations.gradients(pooling, batch.targets[pooling]))


def _layer_cam(batch: Batch, pooling: str) -> Tensor:
    return cam.class_activation_map(batch.activations.feature_maps, batch.gradients(pooling).clamp(min=0))


def _score_cam(batch: Batch, pooling: str) -> Tensor:
    return cam.class_activation_map(batch.activations.feature_maps, batch.score_cam_weights[pooling])


def _random(batch: Batch, pooling: str) -> Tensor:
    """One uniform number a location. It depends on the seed and on the position of the image in its data set alone."""
    # numpy mixes both numbers into the state; torch's generator on the CPU keeps 32 bits of a seed.
    maps = [
        torch.from_numpy(np.random.default_rng((batch.seed, index)).random(tuple(batch.grid), dtype=np.float32))
        for index in batch.indices.tolist()
    ]
    return batch.expand_targets(cam.scale_maps(torch.stack(maps)).to(batch.x.device), pooling)


def _centre(batch: Batch, pooling: str) -> Tensor:
    """A Gaussian in the middle of the image. Its sigma is a quarter of the height and of the width."""
    rows, columns = (torch.exp(-0.5 * (4 * ((torch.arange(n) + 0.5) / n - 0.5)) ** 2) for n in batch.x.shape[-2:])
    maps = cam.scale_maps(torch.outer(rows, columns)).to(batch.x.device)
    return batch.expand_targets(maps.expand(len(batch.x), -1, -1), pooling)


_CAM = frozenset({'feature maps'})
_GRADIENT = _CAM | {'gradients'}

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method('attention', 'Attention', _attention, _CAM | {'stream'}, in_paper=True),
        Method('grad_cam', 'Grad-CAM', _grad_cam, _GRADIENT, in_paper=True),
        Method('grad_cam_pp', 'Grad-CAM++', _grad_cam_pp, _GRADIENT, in_paper=True),
        Method('score_cam', 'Score-CAM', _score_cam, _CAM | {'masked forwards'}, in_paper=True),
        Method('layer_cam', 'Layer-CAM', _layer_cam, _GRADIENT),
        Method('xgrad_cam', 'XGrad-CAM', _xgrad_cam, _GRADIENT),
        Method('hires_cam', 'HiResCAM', _hires_cam, _GRADIENT),
        Method('random', 'Random', _random, frozenset({'seed', 'grid'})),
        Method('centre', 'Centre', _centre),
    )
}
PAPER_METHODS = tuple(method.name for method in METHODS.values() if method.in_paper)
# The methods of the paper's tables: those that explain a class.
TABLE_METHODS = tuple(name for name in PAPER_METHODS if 'stream' not in METHODS[name].needs)

# Those that an evaluation runs unless told otherwise: with the baselines, which a method must beat.
DEFAULT_METHODS = (*TABLE_METHODS, 'random', 'centre')


def method_title(name: str) -> str:
    """The title of a method of the table, or the label of a method of the user."""
    return METHODS[name].title if name in METHODS else name
