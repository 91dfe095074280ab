"""Forwards of one small image, which find the modules that run and their outputs.

Letters: B images, D channels, H x W locations, N tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .freezing import is_norm
from .layout import ImageSize
from .wrappers import eager, evaluation_mode

# Errors of networks at an image of a size that they do not take.
PROBE_ERRORS = (AssertionError, RuntimeError, ValueError)

Head = Callable[[Tensor], Tensor]


def hook_target(module: nn.Module) -> nn.Module:
    """The module to hook for a stage's output: a Sequential's last block.

    Gradient checkpointing flattens Sequentials (timm's `checkpoint_seq(flatten=True)`), whose own hooks then never
    fire. A normalisation layer at the end is no block, and may be replaced by a synchronised one.
    """
    while isinstance(module, nn.Sequential) and len(module) and not is_norm(module[-1]):
        module = module[-1]
    return module


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside, every module's own mode afterwards."""
    try:
        with evaluation_mode(model), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        # tiny_vit and others of timm's keep what eval mode computed of weights that may be loaded only later.
        caching: list[Any] = [module for module in model.modules() if hasattr(module, 'attention_bias_cache')]
        for module in caching:
            module.attention_bias_cache = {}


@dataclass
class ModuleOutput:
    """The output of one module in the probe.

    Attributes:
        name: Name of the module.
        output: Its output.
        features: The one feature map in the output, or None.
        item: Index of the feature map in a tuple.
        version: Changes in place of the feature map so far.
    """

    name: str
    output: Any
    features: Tensor | None = None
    item: int | None = None
    version: int = 0

    def __post_init__(self) -> None:
        items = list(enumerate(self.output)) if isinstance(self.output, tuple) else [(None, self.output)]
        # mvitv2 gives tokens and their grid, tnt tokens of pixels (another batch size) and of patches.
        maps = [
            (item, value)
            for item, value in items
            if isinstance(value, Tensor) and value.ndim in (3, 4) and value.shape[0] == 1
        ]
        if len(maps) == 1:
            ((self.item, self.features),) = maps
            # torch has no public counter of the changes in place of a tensor.
            self.version = self.features._version

    def unusable_because(self, model: nn.Module, in_place: bool = True) -> str | None:
        """Why the output cannot be a stage, or None."""
        kind = type(model).__name__
        if self.features is None:
            return (
                f'{self.name} of {kind} gives {shape_text(self.output)} and not one feature map, (B, D, H, W), '
                '(B, H, W, D) or (B, N, D).'
            )
        if in_place and self.features._version != self.version:
            return (
                f'The output of {self.name} is changed in place by the module that follows it in {kind}; name that '
                'module instead.'
            )
        return None


@dataclass
class Probe:
    """One forward of one small image: the modules in the order in which they ran, and the final feature map.

    Attributes:
        image_size: Height and width of the image.
        visits: The modules that ran.
        features: Output of `forward_features`, or of the network where it is not timm's.
        layers_with_gradient: Names of the modules with a gradient at their patch tokens, where the probe has asked for
            them, in the order in which they ran. None on the meta device.
    """

    image_size: ImageSize
    visits: list[ModuleOutput]
    features: Any
    layers_with_gradient: list[str] | None = None


def run_probe(
    model: nn.Module, names: list[str], head: Head | None = None, forward: Callable[[Tensor], Any] | None = None
) -> Probe:
    """One forward of an image of the first size that the model takes.

    Args:
        model: The network.
        names: The modules to visit.
        head: Function from the output of the forward to class scores, whose gradients tell `layers_with_gradient`.
        forward: The forward. None: timm's `forward_features`, or the model's own where it has none.
    """
    failure: Exception | None = None
    for size in _image_sizes(model):
        try:
            return run_image(model, names, size, head, forward)
        except PROBE_ERRORS as error:
            failure = failure or error
    sizes = ', '.join(f'{height} x {width}' for _, height, width in _image_sizes(model)[:3])
    raise ValueError(
        f'{type(model).__name__} takes no image of {sizes} or other sizes, so its stages cannot be found: {failure}'
    ) from failure


def run_image(
    model: Any,
    names: list[str],
    size: tuple[int, int, int],
    head: Head | None = None,
    forward: Callable[[Tensor], Any] | None = None,
) -> Probe:
    """One forward of an image of a size (3, H, W). The other arguments are those of `run_probe`."""
    visits: list[ModuleOutput] = []
    thread = threading.get_ident()

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def visit(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread:  # not another thread's forward of the same model
                visits.append(ModuleOutput(name, output))

        return visit

    handles = [hook_target(model.get_submodule(name)).register_forward_hook(hook(name)) for name in names]
    forward = forward or getattr(model, 'forward_features', model)
    images = torch.zeros(1, *size, **placement(model))
    try:
        with eager():
            if head is None:
                return Probe(size[1:], visits, forward(images))
            with torch.enable_grad():
                images = torch.arange(images.numel(), device=images.device).sin().to(images.dtype).view_as(images)
                features = forward(images.requires_grad_())
                return Probe(size[1:], visits, features, _layers_with_gradient(visits, head(features)))
    finally:
        for handle in handles:
            handle.remove()


def placement(model: nn.Module) -> dict[str, Any]:
    """Device and type of the parameters, as arguments of torch's functions."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return {'device': parameter.device, 'dtype': parameter.dtype}


def input_channels(model: nn.Module) -> tuple[int, int]:
    """Channels of the images that the model may take, the likely number first."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    in_chans = (cfg.get('input_size') or (3,))[0]
    first_conv = first_convolution(model)
    # The first convolution has the channels of create_model(in_chans=...); some networks turn pixels into channels
    # before it.
    return (in_chans if first_conv is None else first_conv.in_channels, in_chans)


def first_convolution(model: nn.Module) -> nn.Conv2d | None:
    """The first convolution in the order of the modules."""
    return next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)


def shape_text(output: Any) -> str:
    """The shape of a tensor or the type of another output, for messages."""
    return str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__


def _image_sizes(model: Any) -> list[tuple[int, int, int]]:
    """Sizes (3, H, W) of images that the model may take, the cheapest first."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    _, *full = cfg.get('input_size') or (3, 224, 224)
    own = list(_own_image_sizes(model))
    if cfg.get('fixed_input_size', False):
        # create_model(img_size=...) is not in the cfg, and not every network keeps it.
        sides = [*own, tuple(full), *((side, side) for side in range(32, 1025, 32))]
    else:
        sides = [(min(64, full[0]), min(64, full[1])), tuple(full), *own]
    sizes = [(channels, *pair) for pair in sides for channels in input_channels(model)]
    return list(dict.fromkeys(sizes))


def _own_image_sizes(model: Any) -> Iterator[tuple[int, int]]:
    """Image sizes that a network of one size keeps in its modules."""
    for module in model.modules():
        size = getattr(module, 'img_size', None)
        if isinstance(size, int):
            size = (size, size)
        if isinstance(size, (tuple, list)) and len(size) == 2:
            yield size[0], size[1]
    grid = list(getattr(model, 'tokens_spatial_shape', ()))  # Hiera's
    if len(grid) == 2:
        yield grid[0] * model.patch_stride[0], grid[1] * model.patch_stride[1]


def _layers_with_gradient(visits: list[ModuleOutput], output: Tensor) -> list[str] | None:
    """Names of the visits whose locations have a gradient of a head's output."""
    # Different weights: the sum of a LayerNorm's output is constant.
    weights = torch.arange(1.0, output.numel() + 1, device=output.device).cos().to(output.dtype)
    maps = [visit.features for visit in visits if visit.features is not None and visit.features.requires_grad]
    names = [visit.name for visit in visits if visit.features is not None and visit.features.requires_grad]
    if not maps or not output.requires_grad:
        return []
    gradients = torch.autograd.grad((output.flatten() * weights).sum(), maps, allow_unused=True)
    if any(gradient is not None and gradient.is_meta for gradient in gradients):
        return None
    # A class token has a gradient at one place alone.
    return [
        name
        for name, gradient in zip(names, gradients, strict=True)
        if gradient is not None and (gradient.abs().sum(-1) != 0).sum() > gradient.shape[1] // 2
    ]
