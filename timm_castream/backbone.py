"""Stages of a network, found by small forwards: which modules run, how their outputs lie, how the head pools.

Letters: B images, D channels, H x W locations, N tokens, l a stage from 0 to L.
"""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import ConvNeXt, ResNet
from torch import Tensor, nn

from .freezing import is_norm
from .layout import NCHW, NHWC, ImageSize, Layout, Stage

# Name of the pooled stage where it is the output of no named module.
POOLED = 'forward_features'

# timm's feature_info names `act1` for ResNet, whose F_0 is after the max pooling, and no stem for ConvNeXt.
PAPER_STAGES: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (ResNet, ('maxpool', 'layer1', 'layer2', 'layer3', 'layer4')),
    (ConvNeXt, ('stem', 'stages.0', 'stages.1', 'stages.2', 'stages.3')),
)


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


def find_stages(model: nn.Module, names: Sequence[str] | None = None) -> tuple[Stage, ...]:
    """Finds the stages of a timm model by one small forward.

    Args:
        model: A timm model without a stream.
        names: Module names in the order in which they run, or None for the default stages.

    Returns:
        The stages in the order in which they run. The last one is the tensor that the model pools.

    Raises:
        ValueError: If the model pools no feature map by average or maximum, or a name does not fit.
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
        probe = _run_probe(model, chosen)
        pooled = _pooled_stage(model, probe)
        if head_pooling(model, pooled, model.forward_head) is None:  # type: ignore[arg-type]
            raise ValueError(f'{kind} does not pool the feature map that its forward_features gives by average or '
                             'maximum, so a CA-Stream cannot take that place.')
        if names is None:
            last_name = chosen[-1] if chosen else POOLED
            visits = [v for v in probe.visits if v.name != last_name and not v.problem(kind)]
        else:
            visits = list(probe.visits)
            for visit in visits:
                if visit.problem(kind):
                    raise ValueError(visit.problem(kind))
            if [v.name for v in visits] != chosen:
                raise ValueError(f'stream_stages {chosen} must be modules that {kind} runs once, before its head, and '
                                 f'in the order in which it runs them: {[v.name for v in visits]}.')
            last_name = visits.pop().name if visits[-1].output is probe.features else POOLED
        stages = [_stage(model, probe, visit) for visit in visits]
    return (*stages, Stage(last_name, pooled.dim, pooled.layout))


def find_stage(model: nn.Module, name: str) -> Stage:
    """The stage of one module: of a timm model, with a stream or without, or of any network for images.

    Raises:
        ValueError: If there is no such module, it does not run once before the pooling, or it gives no feature map.
    """
    kind = type(model).__name__
    if not _has_module(model, name):
        children = ', '.join(child for child, _ in model.named_children())
        raise ValueError(f'layer {name!r} is no module of {kind}; it has {children} and their submodules.')
    with eval_mode(model):
        probe = _run_probe(model, [name])
        if len(probe.visits) != 1:
            raise ValueError(f'layer {name!r} of {kind} runs {len(probe.visits)} times before the pooling: name a '
                             'module that runs once.')
        problem = probe.visits[0].problem(kind, in_place=False)
        if problem:
            raise ValueError(problem)
        return _stage(model, probe, probe.visits[0])


def pooled_stage(model: nn.Module) -> Stage:
    """The tensor that a timm model gives to its head, with a stream or without.

    Raises:
        ValueError: If it is no feature map.
    """
    own = getattr(model, 'pooled_stage', None)  # attach found it
    if isinstance(own, Stage):
        return own
    with eval_mode(model):
        return _pooled_stage(model, _run_probe(model, []))


def head_pooling(model: nn.Module, pooled: Stage, head: Callable[..., Tensor]) -> str | None:
    """How a head pools.

    The head is given a map, and maps of one location that hold the average or the maximum of the first: equal outputs
    tell how it pools.

    Args:
        model: A timm model.
        pooled: Its pooled stage.
        head: Its own `forward_head`.

    Returns:
        `'avg'`, `'max'` or `'avgmax'`, None for another pooling, or `''` where the head hands the map on unpooled, as
        after `reset_classifier(0, '')`. On the meta device, where no values can be compared, `'avg'`.
    """
    with eval_mode(model):
        placement = _placement(model)
        if head(pooled.one_location(torch.zeros(1, pooled.dim, **placement)), pre_logits=True).ndim > 2:
            return ''
        features = torch.linspace(0, 100, 18 * pooled.dim, dtype=torch.float32).sin().reshape(2, pooled.dim, 3, 3)
        features = features.to(**placement)
        mean, peak = features.mean((2, 3)), features.amax((2, 3))
        output = head(pooled.layout.pack(features, -peak), pre_logits=True)
        if output.is_meta:
            return 'avg'
        tolerance = 1e-4 if output.dtype in (torch.float32, torch.float64) else 2e-2
        for name, vector in (('avg', mean), ('max', peak), ('avgmax', (mean + peak) / 2)):
            other = head(pooled.one_location(vector), pre_logits=True)
            if torch.allclose(output, other, rtol=tolerance, atol=tolerance):
                return name
    return None


@dataclass
class _Visit:
    """The output of one module in the probe."""

    name: str
    output: Any
    version: int

    def problem(self, kind: str, in_place: bool = True) -> str | None:
        """Why the output cannot be a stage, or None."""
        if not isinstance(self.output, Tensor) or self.output.ndim != 4:
            return (f'{self.name} of {kind} gives {_shape(self.output)} and not one feature map, (B, D, H, W) or '
                    '(B, H, W, D).')
        if in_place and self.output._version != self.version:
            return (f'The output of {self.name} is changed in place by the module that follows it in {kind}; name that '
                    'module instead.')
        return None


@dataclass
class _Probe:
    """One forward of one small image: the modules in the order in which they ran, and the final feature map."""

    image_size: ImageSize
    visits: list[_Visit]
    features: Any


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        return bool(name) and model.get_submodule(name) is not None  # '' would be the model
    except AttributeError:
        return False


def _shape(output: Any) -> str:
    return str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__


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


def _pooled_stage(model: nn.Module, probe: _Probe) -> Stage:
    features = probe.features
    if not isinstance(features, Tensor) or features.ndim != 4:
        raise ValueError(f'{type(model).__name__} pools no spatial feature map: its forward_features gives '
                         f'{_shape(features)}, a CA-Stream needs (B, C, H, W).')
    return _stage(model, probe, _Visit(POOLED, features, 0))


def _stage(model: nn.Module, probe: _Probe, visit: _Visit) -> Stage:
    layout = _layout(model, probe, visit)
    return Stage(visit.name, layout.view(layout.tensor(visit.output)).shape[1], layout)


def _layout(model: nn.Module, probe: _Probe, visit: _Visit) -> Layout:
    """Whether the channels of a map come before its locations or after them.

    Locations follow the sides of the image. Where both readings do, a second image of twice the size tells: its map has
    as many channels and other sides.
    """
    shape = visit.output.shape
    first, last = _is_grid(shape[2:], probe.image_size), _is_grid(shape[1:3], probe.image_size)
    if first == last:
        height, width = probe.image_size
        channels = _input_channels(model)[0]
        try:
            second = _run_image(model, [] if visit.name == POOLED else [visit.name], (channels, 2 * height, 2 * width))
            other = second.features if visit.name == POOLED else second.visits[0].output
            first, last = other.shape[3] != shape[3], other.shape[1] != shape[1]
        except _PROBE_ERRORS:  # a network of one image size
            last = getattr(model, 'output_fmt', 'NCHW') == 'NHWC'
            first = not last
    return NCHW() if first and not last else NHWC()


def _is_grid(sides: Sequence[int], image_size: ImageSize) -> bool:
    """Whether two sides follow those of an image, up to rounding by one location."""
    (rows, columns), (height, width) = sides, image_size
    return abs(rows * width - columns * height) < max(height, width)


_PROBE_ERRORS = (AssertionError, RuntimeError, ValueError)


def _placement(model: nn.Module) -> dict[str, Any]:
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return {'device': parameter.device, 'dtype': parameter.dtype}


def _input_channels(model: nn.Module) -> tuple[int, int]:
    """Channels of the images that the model may take, the likely number first."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    in_chans = (cfg.get('input_size') or (3,))[0]
    first_conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    # The first convolution has the channels of create_model(in_chans=...); some networks turn pixels into channels
    # before it.
    return (in_chans if first_conv is None else first_conv.in_channels, in_chans)


def _image_sizes(model: Any) -> list[tuple[int, int, int]]:
    """Sizes (3, H, W) of images that the model may take, the cheapest first."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    full = list(cfg.get('input_size') or (3, 224, 224))[1:]
    small = full if cfg.get('fixed_input_size', False) else [min(64, side) for side in full]
    embed: Any = getattr(model, 'patch_embed', None)
    if cfg.get('fixed_input_size', False) and isinstance(getattr(embed, 'img_size', None), tuple):
        small = list(embed.img_size)  # create_model(img_size=...) is not in the cfg
    sizes = [(channels, *sides) for sides in (small, full) for channels in _input_channels(model)]
    return list(dict.fromkeys(sizes))


def _run_probe(model: nn.Module, names: list[str]) -> _Probe:
    """One forward of an image of the first size that the model takes."""
    failure: Exception | None = None
    for size in _image_sizes(model):
        try:
            return _run_image(model, names, size)
        except _PROBE_ERRORS as error:
            failure = failure or error
    raise ValueError(f'{type(model).__name__} takes none of the image sizes {_image_sizes(model)}, so its stages '
                     f'cannot be found: {failure}') from failure


def _run_image(model: Any, names: list[str], size: tuple[int, int, int]) -> _Probe:
    visits: list[_Visit] = []
    thread = threading.get_ident()

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def visit(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread:  # not another thread's forward of the same model
                # torch has no public counter of the changes in place of a tensor.
                visits.append(_Visit(name, output, getattr(output, '_version', 0)))
        return visit

    handles = [hook_target(model.get_submodule(name)).register_forward_hook(hook(name)) for name in names]
    forward = getattr(model, 'forward_features', model)
    try:
        features = forward(torch.zeros(1, *size, **_placement(model)))
    finally:
        for handle in handles:
            handle.remove()
    return _Probe(size[1:], visits, features)
