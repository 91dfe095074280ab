"""What a stream asks of the timm model beside it: its stages, its head, its normalisation layers.

Letters: B images, D channels, H x W locations, l a stage from 0 to L.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import ConvNeXt, ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

# timm's feature_info names `act1` for ResNet, whose F_0 is after the max pooling, and no stem for ConvNeXt.
PAPER_STAGES: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (ResNet, ('maxpool', 'layer1', 'layer2', 'layer3', 'layer4')),
    (ConvNeXt, ('stem', 'stages.0', 'stages.1', 'stages.2', 'stages.3')),
)


@dataclass
class Stages:
    """The stages of a backbone in the order in which they run.

    Attributes:
        names: Module names; the last one stands for the map that is pooled.
        dims: Channels D_l of each.
    """

    names: tuple[str, ...]
    dims: tuple[int, ...]


def is_nhwc(model: nn.Module) -> bool:
    """Whether a backbone's feature maps are (B, H, W, D), as timm's swin has them."""
    return getattr(model, 'output_fmt', 'NCHW') == 'NHWC'


def one_location(model: nn.Module, vector: Tensor) -> Tensor:
    """(B, D) vectors as feature maps of one location, in the backbone's own layout."""
    return vector[:, None, None, :] if is_nhwc(model) else vector[:, :, None, None]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer. Ask when needed: SyncBatchNorm takes BatchNorm's place later."""
    return isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm)) or hasattr(module, 'running_var')


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
    switched = [module for module in model.modules() if module.training]
    for module in switched:
        module.training = False
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module in switched:
            module.training = True
        # tiny_vit and others of timm's keep what eval mode computed of weights that may be loaded only later.
        caching: list[Any] = [module for module in model.modules() if hasattr(module, 'attention_bias_cache')]
        for module in caching:
            module.attention_bias_cache = {}


def head_pools(model: Any, head: Callable[..., Tensor]) -> bool:
    """Whether `head`, the model's own `forward_head`, pools: not so after `reset_classifier(0, '')`."""
    location = one_location(model, torch.zeros(1, model.num_features, **_placement(model)))
    with eval_mode(model):
        return head(location, pre_logits=True).ndim == 2


def find_stages(model: nn.Module, names: Sequence[str] | None = None) -> Stages:
    """Finds the stages of a model by one small forward.

    Args:
        model: A timm model without a stream.
        names: Module names in the order in which they run, or None for the default stages.

    Raises:
        ValueError: If the model pools no spatial feature map, or a name does not fit.
    """
    kind = type(model).__name__
    # Of the class: torch.compile's wrapper shows the attributes of the model inside.
    if not all(hasattr(type(model), m) for m in ('forward_features', 'forward_head', 'reset_classifier')):
        raise ValueError(f'{kind} is no timm classification model: it lacks forward_features, forward_head or '
                         'reset_classifier.')
    if not isinstance(names, (list, tuple, type(None))):
        raise ValueError(f'stream_stages {names!r} is no list of module names, for example {_default_names(model)}.')
    chosen = _default_names(model) if names is None else list(names)
    if names is not None:
        _check_names(model, chosen)
    with eval_mode(model):
        visits, features = _run_stages(model, chosen)
        _check_pooled(model, features)
    pooled_last = names is None or (bool(visits) and visits[-1].output is features)
    if names is None:
        last_name = chosen[-1] if chosen else 'forward_features'
        visits = [v for v in visits if v.name != last_name and not v.problem(kind)]
    else:
        for visit in visits:
            if visit.problem(kind):
                raise ValueError(visit.problem(kind))
        if [v.name for v in visits] != chosen:
            raise ValueError(f'stream_stages {chosen} must be modules that {kind} runs once, before its head, and in '
                             f'the order in which it runs them: {[v.name for v in visits]}.')
        last_name = visits.pop().name if pooled_last else 'forward_features'
    channel_dim = -1 if is_nhwc(model) else 1
    return Stages(
        names=(*(v.name for v in visits), last_name),
        dims=(*(v.output.shape[channel_dim] for v in visits), features.shape[channel_dim]),
    )


@dataclass
class _Visit:
    """What the probe saw of one stage."""

    name: str
    output: Any
    version: int  # counts changes in place

    def problem(self, kind: str) -> str | None:
        """Why the output cannot be a stage, or None."""
        if not isinstance(self.output, Tensor) or self.output.ndim != 4:
            return f'{self.name} of {kind} does not give one 4-dimensional feature map, so it cannot be a stage.'
        if self.output._version != self.version:
            return (f'The output of {self.name} is changed in place by the module that follows it in {kind}; name that '
                    'module instead.')
        return None


def _default_names(model: nn.Module) -> list[str]:
    for kind, names in PAPER_STAGES:
        if isinstance(model, kind):
            return list(names)
    modules = dict(model.named_modules())
    named = [info.get('module', '') for info in getattr(model, 'feature_info', None) or []]
    # Some of timm's tables name a module that is none, or '', the whole model.
    return [name for name in named if name and name in modules]


def _check_names(model: nn.Module, names: list[str]) -> None:
    modules = dict(model.named_modules())
    for name in names:
        if not name or name not in modules:
            raise ValueError(f'{name!r} in stream_stages is no module of {type(model).__name__}; its stages are '
                             f'{", ".join(_default_names(model))}.')
    if not names or len({hook_target(modules[name]) for name in names}) < len(names):
        raise ValueError(f'stream_stages {names} must name one or more different stages of {type(model).__name__}, for '
                         f'example {_default_names(model)}.')


def _placement(model: nn.Module) -> dict[str, Any]:
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return {'device': parameter.device, 'dtype': parameter.dtype}


def _image_sizes(model: Any) -> list[tuple[int, int, int]]:
    """Sizes (3, H, W) of images that the model may take, the cheapest first."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    in_chans, *full = cfg.get('input_size') or (3, 224, 224)
    small = full if cfg.get('fixed_input_size', False) else [min(64, side) for side in full]
    embed: Any = getattr(model, 'patch_embed', None)
    if cfg.get('fixed_input_size', False) and isinstance(getattr(embed, 'img_size', None), tuple):
        small = list(embed.img_size)  # create_model(img_size=...) is not in the cfg
    first_conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    # The first convolution knows create_model(in_chans=...), but in some networks pixels become channels before it.
    channels = (in_chans if first_conv is None else first_conv.in_channels, in_chans)
    return list(dict.fromkeys((c, height, width) for height, width in (small, full) for c in channels))


def _run_stages(model: nn.Module, names: list[str]) -> tuple[list[_Visit], Any]:
    """One forward of a small image: the stages in the order in which they ran, and the final feature map."""
    failure: Exception | None = None
    for size in _image_sizes(model):
        try:
            return _run_image(model, names, size)
        except (AssertionError, RuntimeError, ValueError) as error:
            failure = failure or error
    raise ValueError(f'{type(model).__name__} takes none of the image sizes {_image_sizes(model)}, so its stages '
                     f'cannot be found: {failure}') from failure


def _run_image(model: Any, names: list[str], size: tuple[int, int, int]) -> tuple[list[_Visit], Any]:
    visits: list[_Visit] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: visits.append(_Visit(name, output, getattr(output, '_version', 0)))

    handles = [hook_target(model.get_submodule(name)).register_forward_hook(hook(name)) for name in names]
    try:
        features = model.forward_features(torch.zeros(1, *size, **_placement(model)))
    finally:
        for handle in handles:
            handle.remove()
    return visits, features


def _check_pooled(model: Any, features: Any) -> None:
    """Raises unless the head pools `features` first: then it gives the same for a map and for its pooled location."""
    kind = type(model).__name__
    if not isinstance(features, Tensor) or features.ndim != 4:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f'{kind} pools no spatial feature map: its forward_features gives {shape}, a CA-Stream needs '
                         '(B, C, H, W).')
    location = one_location(model, torch.zeros(2, model.num_features, **_placement(model)))
    head = model.forward_head(location, pre_logits=True)
    if head.ndim == 4:  # global_pool='': nothing to compare
        return
    spatial = (1, 2) if is_nhwc(model) else (2, 3)
    sides = [3 if dim in spatial else n for dim, n in enumerate(location.shape)]
    probe = torch.linspace(0, 100, math.prod(sides), dtype=torch.float32).sin().reshape(sides).to(location)
    mean, peak = probe.mean(spatial, keepdim=True), probe.amax(spatial, keepdim=True)
    output = model.forward_head(probe, pre_logits=True)
    if output.is_meta:
        return
    tolerance = 1e-4 if output.dtype in (torch.float32, torch.float64) else 2e-2
    if not any(torch.allclose(output, model.forward_head(pooled, pre_logits=True), rtol=tolerance, atol=tolerance)
               for pooled in (mean, peak, (mean + peak) / 2)):
        raise ValueError(f'{kind} does not pool the feature map that its forward_features gives by average or maximum, '
                         'so a CA-Stream cannot take that place.')
