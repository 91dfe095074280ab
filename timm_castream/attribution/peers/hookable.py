"""The network under explanation as other libraries take it: a module that gives a tensor of scores, with a layer to hook.

Letters: B images, C classes, D channels and h x w locations of the layer.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...backbones.layout import Stage
from ...backbones.mixin import carry_query
from ...backbones.probe import hook_target
from ...backbones.wrappers import class_scores, in_precision_of
from ...inference.predictor import Predictor
from ..restoring import as_it_was


class HookableNetwork(nn.Module):
    """A network whose feature maps pass a module of their own, as (B, D, h, w) in any layout.

    Libraries hook `layer`. What their hooks put in its place is what the network computes with.

    Args:
        model: The network.
        as_classes: Function from the (B, C) scores in its output to the scores that are explained.

    Attributes:
        model: The network.
        layer: The module that the feature maps pass, or None where they pass none.
        classifier: The last linear layer of a timm model, or None.
        image_size: Height and width of the images of the last forward.
    """

    def __init__(self, model: nn.Module, as_classes: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.layer: Any = None
        self.classifier: Any = None
        self.image_size: torch.Size | None = None
        self._as_classes = as_classes

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) scores of (B, 3, H, W) images."""
        self.image_size = x.shape[-2:]
        output = class_scores(self.model(in_precision_of(self.model, x)), len(x), type(self.model).__name__)
        return self._as_classes(output)

    def through_layer(self, stage: Stage, output: Any) -> Any:
        """The output of a stage after its feature map has passed `layer`."""
        tensor = stage.tensor(output)
        # A copy: libraries change what they hooked in place, which neither a view nor the network may feel.
        maps = stage.to_nchw(tensor, self.image_size).clone()
        if torch.is_grad_enabled() and not maps.requires_grad:  # all weights before it are frozen
            maps.requires_grad_()
        maps = self.layer(maps)
        # Position of each number of (D, h, w) in the layout: prefix tokens stay, sorted tokens get their place back.
        numbers = torch.arange(tensor[0].numel(), device=tensor.device).view(1, *tensor.shape[1:])
        places = stage.to_nchw(numbers, self.image_size).flatten()
        return stage.with_features(output, tensor.flatten(1).index_copy(1, places, maps.flatten(1)).view_as(tensor))


@contextmanager
def hookable(predictor: Predictor, pooling: str, layer: bool = True) -> Iterator[HookableNetwork]:
    """The network of a pooling for one call of a library. Everything that the call leaves on it is undone.

    Args:
        predictor: The network, in evaluation mode.
        pooling: `'gap'` or `'ca'`.
        layer: Whether the feature maps pass a module that can be hooked.
    """
    model = predictor.inner
    with ExitStack() as stack:
        stack.enter_context(_silence())
        stack.enter_context(as_it_was(model, values=False))
        stack.enter_context(predictor.pooled_by(pooling))
        stack.enter_context(torch.autocast(predictor.device.type, enabled=False))  # bfloat16 has no numpy type
        stack.enter_context(torch.enable_grad())
        hooked = HookableNetwork(model, predictor.as_classes).eval()
        hooked.classifier = _classifier(predictor)
        if layer:
            hooked.layer = nn.Identity()
            if predictor.cam_layer is None:
                stack.enter_context(_before_head(predictor, hooked))
            else:
                stack.enter_context(_at_module(predictor, hooked))
        yield hooked


@contextmanager
def _before_head(predictor: Predictor, hooked: HookableNetwork) -> Iterator[None]:
    """Sends the tensor that a timm model pools through the layer. It may be the output of no module."""
    backbone, stage = predictor.backbone, predictor.stage
    forward_head = backbone.forward_head

    def routed(features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return forward_head(carry_query(features, hooked.through_layer(stage, features)), *args, **kwargs)

    backbone.forward_head = routed
    try:
        yield
    finally:
        vars(backbone).pop('forward_head', None)


@contextmanager
def _at_module(predictor: Predictor, hooked: HookableNetwork) -> Iterator[None]:
    """Sends the feature map in the output of a module through the layer."""
    stage = predictor.stage
    module = hook_target(predictor.owner_of(stage.name).get_submodule(stage.name))
    # This hook runs before the stream's hook on the same module: the gradient through the attention counts.
    handle = module.register_forward_hook(lambda _, args, output: hooked.through_layer(stage, output), prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _classifier(predictor: Predictor) -> nn.Module | None:
    classifier = predictor.backbone.get_classifier() if predictor.is_timm else None
    return classifier if isinstance(classifier, (nn.Linear, nn.Conv2d)) else None


@contextmanager
def _silence() -> Iterator[None]:
    """Hides the progress bars, prints and warnings of a library, a line for each image and call."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter('ignore')
        yield
