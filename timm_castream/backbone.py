"""Stages of a network, found by small forwards: which modules run, how their outputs lie, how the head pools.

Letters: B images, D channels, H x W locations, N tokens, l a stage from 0 to L.
"""
from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import CoaT, ConvNeXt, HighResolutionNet, MultiScaleVit, ResNet, Twins
from torch import Tensor, nn

from .families import has_raster_tokens, reason_for
from .freezing import is_norm
from .layout import NCHW, NHWC, ImageSize, Layout, Stage, Tokens

# Name of the pooled stage where it is the output of no named module.
POOLED = 'forward_features'

# Networks whose feature_info names other modules than those that give the stages.
NAMED_STAGES: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    # The paper's: feature_info has `act1` for ResNet, whose F_0 is after the max pooling, and no stem for ConvNeXt.
    (ResNet, ('maxpool', 'layer1', 'layer2', 'layer3', 'layer4')),
    (ConvNeXt, ('stem', 'stages.0', 'stages.1', 'stages.2', 'stages.3')),
    # feature_info is missing in timm before 1.0.31.
    (CoaT, ('serial_blocks1', 'serial_blocks2', 'serial_blocks3', 'serial_blocks4')),
    # feature_info has names that are no modules of these.
    (HighResolutionNet, ('incre_modules.0', 'incre_modules.1', 'incre_modules.2', 'incre_modules.3', 'final_layer')),
    (MultiScaleVit, ('stages.0', 'stages.1', 'stages.2', 'stages.3')),
    (Twins, ('blocks.0', 'blocks.1', 'blocks.2', 'blocks.3')),
)

# Default stages of a network whose blocks all have one resolution.
MAX_DEFAULT_STAGES = 5


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
    if reason_for(model):
        raise ValueError(f'{kind} takes no CA-Stream: {reason_for(model)}.')
    if not isinstance(names, (list, tuple, type(None))):
        raise ValueError(f'stream_stages {names!r} is no list of module names, for example {_default_names(model)}.')
    chosen = _default_names(model) if names is None else list(names)
    if names is not None:
        _check_names(model, chosen)
    with eval_mode(model):
        probe = _run_probe(model, chosen)
        pooled = _pooled_stage(model, probe)
        if head_pooling(model, pooled, model.forward_head) is None:  # type: ignore[arg-type]
            raise ValueError(f'{kind} does not pool the feature map that its forward_features gives by average, by '
                             'maximum or by a class token, so a CA-Stream cannot take that place.')
        visits = list(probe.visits)
        if names is None:
            last_name = chosen[-1] if chosen else POOLED
            visits = [visit for visit in visits if visit.name != last_name and not visit.problem(model)]
        else:
            for visit in visits:
                if visit.problem(model):
                    raise ValueError(visit.problem(model))
            if [v.name for v in visits] != chosen:
                raise ValueError(f'stream_stages {chosen} must be modules that {kind} runs once, before its head, and '
                                 f'in the order in which it runs them: {[v.name for v in visits]}.')
            last_name = visits.pop().name if visits[-1].output is probe.features else POOLED
        stages = [*(_stage(model, probe, visit) for visit in visits), Stage(last_name, pooled.dim, pooled.layout)]
    if any(isinstance(stage.layout, Tokens) for stage in stages) and not has_raster_tokens(model):
        raise ValueError(f'{kind} gives patch tokens, (B, N, D), and the order of its tokens is unknown: a CA-Stream '
                         'takes token networks of timm alone.')
    return tuple(stages)


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
        problem = probe.visits[0].problem(model, in_place=False)
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


def cam_layer(model: nn.Module) -> str | None:
    """The layer that the CAM methods read by default.

    A head that reads the class token alone gives no gradients to the patch tokens that it receives. There it is the
    last block whose patch tokens still reach the head.

    Args:
        model: A timm model, with a stream or without.

    Returns:
        The name of the block, or None where the tensor that the model pools serves.
    """
    backbone: Any = model
    head = getattr(backbone, 'forward_gap_head', backbone.forward_head)
    pooled = pooled_stage(model)
    if head_pooling(model, pooled, head) != 'token':
        return None
    names = _last_blocks(model)
    with eval_mode(model):
        probe = _run_probe(model, names, lambda features: head(features, pre_logits=True))
    return probe.last_seen or (names[-2] if len(names) > 1 else None)  # the meta device has no gradients


def head_pooling(model: nn.Module, pooled: Stage, head: Callable[..., Tensor]) -> str | None:
    """How a head pools.

    The head is given a map, and maps of one location that hold the average or the maximum of the first: equal outputs
    tell how it pools.

    Args:
        model: A timm model.
        pooled: Its pooled stage.
        head: Its own `forward_head`.

    Returns:
        `'avg'`, `'max'` or `'avgmax'` over the locations, `'tokens'` for an average that takes in the prefix tokens,
        `'token'` for a class token, None for another pooling, or `''` where the head hands the map on unpooled, as
        after `reset_classifier(0, '')`. On the meta device, where no values can be compared, `'token'` or `'avg'` as
        the model's `global_pool` says.
    """
    layout = pooled.layout
    with eval_mode(model):
        placement = _placement(model)
        if head(pooled.one_location(torch.zeros(1, pooled.dim, **placement)), pre_logits=True).ndim > 2:
            return ''
        features = torch.linspace(0, 100, 18 * pooled.dim, dtype=torch.float32).sin().reshape(2, pooled.dim, 3, 3)
        features = features.to(**placement)
        mean, peak = features.mean((2, 3)), features.amax((2, 3))
        prefix = -peak
        output = head(layout.pack(features, prefix), pre_logits=True)
        if output.is_meta:
            return 'token' if getattr(model, 'global_pool', None) == 'token' else 'avg'
        alike = [
            ('avg', pooled.one_location(mean)),
            ('max', pooled.one_location(peak)),
            ('avgmax', pooled.one_location((mean + peak) / 2)),
        ]
        if isinstance(layout, Tokens) and layout.num_prefix:
            count = layout.num_prefix
            alike += [
                ('token', layout.pack(features.roll(1, 1), prefix)),  # other channels: a norm may undo a shift
                ('tokens', pooled.one_location((9 * mean + count * prefix) / (9 + count))),
            ]
        tolerance = 1e-4 if output.dtype in (torch.float32, torch.float64) else 2e-2
        for name, other in alike:
            if torch.allclose(output, head(other, pre_logits=True), rtol=tolerance, atol=tolerance):
                return name
    return None


@dataclass
class _Visit:
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
        maps = [(item, value) for item, value in items
                if isinstance(value, Tensor) and value.ndim in (3, 4) and value.shape[0] == 1]
        if len(maps) == 1:
            (self.item, self.features), = maps
            # torch has no public counter of the changes in place of a tensor.
            self.version = self.features._version

    def problem(self, model: nn.Module, in_place: bool = True) -> str | None:
        """Why the output cannot be a stage, or None."""
        kind = type(model).__name__
        if self.features is None:
            return (f'{self.name} of {kind} gives {_shape(self.output)} and not one feature map, (B, D, H, W), '
                    '(B, H, W, D) or (B, N, D).')
        if in_place and self.features._version != self.version:
            return (f'The output of {self.name} is changed in place by the module that follows it in {kind}; name that '
                    'module instead.')
        return None


@dataclass
class _Probe:
    """One forward of one small image: the modules in the order in which they ran, and the final feature map.

    Attributes:
        image_size: Height and width of the image.
        visits: The modules that ran.
        features: Output of `forward_features`, or of the network where it is not timm's.
        last_seen: Name of the last module with a gradient at its patch tokens, where the probe has asked for one.
    """

    image_size: ImageSize
    visits: list[_Visit]
    features: Any
    last_seen: str | None = None


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        return bool(name) and model.get_submodule(name) is not None  # '' would be the model
    except AttributeError:
        return False


def _shape(output: Any) -> str:
    return str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__


def _default_names(model: nn.Module) -> list[str]:
    """Names of the default stages: those of the paper, those of timm's `feature_info`, or a few blocks."""
    named = [row for kind, row in NAMED_STAGES if isinstance(model, kind)]
    if named:
        return [_resolved(model, name) for name in named[0]]
    names = _block_names(model)
    strides = {info.get('reduction') for info in getattr(model, 'feature_info', None) or []}
    if len(strides) > 1 or len(names) <= MAX_DEFAULT_STAGES:
        return names
    # No stages of its own: a few blocks at equal distances, the last one among them.
    return [names[round(len(names) * (i + 1) / MAX_DEFAULT_STAGES) - 1] for i in range(MAX_DEFAULT_STAGES)]


def _block_names(model: nn.Module) -> list[str]:
    """The modules of timm's `feature_info`, or the blocks of a network without one."""
    modules = dict(model.named_modules())
    names = []
    for info in getattr(model, 'feature_info', None) or []:
        name = info.get('module', '')
        if name not in modules and f'encoder.{name}' in modules:  # gemma4_vit has the names of its encoder
            name = f'encoder.{name}'
        if name and name in modules:  # some of timm's tables name a module that is none, or '', the whole model
            names.append(_resolved(model, name))
    blocks = getattr(model, 'blocks', None)
    if not names and isinstance(blocks, (nn.ModuleList, nn.Sequential)):  # timm before 1.0.31 has no table of some
        names = [f'blocks.{i}' for i in range(len(blocks))]
    return names


def _last_blocks(model: nn.Module) -> list[str]:
    """The stages, the blocks beside the last stage, and the blocks in it."""
    named = [row for kind, row in NAMED_STAGES if isinstance(model, kind)]
    names = [_resolved(model, name) for name in named[0]] if named else _block_names(model)
    if not names:
        return []
    lists = (nn.ModuleList, nn.Sequential)
    parent = names[-1].rpartition('.')[0]
    children = [(parent, model.get_submodule(parent)), *(
        (f'{names[-1]}.{name}', child) for name, child in model.get_submodule(names[-1]).named_children())]
    names += [f'{name}.{i}' for name, module in children if isinstance(module, lists) for i in range(len(module))]
    return list(dict.fromkeys(names))


def _resolved(model: nn.Module, name: str) -> str:
    """The name of the module that runs: a ModuleList does not, its last child does."""
    module = model.get_submodule(name)
    return f'{name}.{len(module) - 1}' if isinstance(module, nn.ModuleList) and len(module) else name


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
    visit = _Visit(POOLED, probe.features)
    if visit.features is None or visit.item is not None:
        raise ValueError(f'{type(model).__name__} pools no feature map: its forward_features gives '
                         f'{_shape(probe.features)}, a CA-Stream needs (B, D, H, W), (B, H, W, D) or patch tokens '
                         '(B, N, D).')
    return _stage(model, probe, visit)


def _stage(model: nn.Module, probe: _Probe, visit: _Visit) -> Stage:
    assert visit.features is not None  # problem() comes first
    find = _map_layout if visit.features.ndim == 4 else _token_layout
    layout = find(model, probe, visit)
    return Stage(visit.name, layout.view(visit.features).shape[1], layout)


def _map_layout(model: nn.Module, probe: _Probe, visit: _Visit) -> Layout:
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


def _token_layout(model: nn.Module, probe: _Probe, visit: _Visit) -> Layout:
    """Prefix tokens and stride of patch tokens.

    The number of tokens is P + H * W for a stride that timm gives in `feature_info`, or else for a square patch.
    """
    assert visit.features is not None
    count = visit.features.shape[1]
    prefixes = dict.fromkeys((getattr(model, 'num_prefix_tokens', 0) or 0, *range(9)))
    infos = [info.get('reduction') for info in getattr(model, 'feature_info', None) or []]
    reductions = [stride for stride in dict.fromkeys(infos) if isinstance(stride, int) and stride > 0]
    joined = [factor * stride for stride in reductions for factor in (2, 3)]  # patches of qwen3_vit and deepseek_vit
    height, width = probe.image_size
    for num_prefix in prefixes:
        patches = count - num_prefix
        if patches < 2:
            continue
        square = math.isqrt(height * width // patches)
        exact = square * square * patches == height * width
        for stride in (*reductions, *([square] if exact else []), *joined):
            layout = Tokens(num_prefix, (stride, stride), visit.item, _windows(model, visit.name))
            try:
                layout.grid(patches, probe.image_size)
            except ValueError:
                continue
            return layout
    raise ValueError(f'{visit.name} of {type(model).__name__} gives {count} tokens, which are no grid of an image of '
                     f'{height} x {width} pixels.')


def _windows(model: nn.Module, name: str) -> tuple[tuple[int, int], ...]:
    """The windows by which timm's Hiera sorts the tokens that a block gives."""
    schedule = getattr(getattr(model, 'reroll', None), 'schedule', None)
    if not isinstance(schedule, dict):
        return ()
    block = str(max(schedule)) if name == POOLED else name.removeprefix('blocks.')
    if not block.isdecimal():
        raise ValueError(f'{name} of {type(model).__name__} may give tokens in another order: name one of its blocks, '
                         f'blocks.0 to blocks.{max(schedule)}.')
    return tuple(tuple(sides) for sides in schedule[int(block)][0])


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
    _, *full = cfg.get('input_size') or (3, 224, 224)
    own = list(_own_image_sizes(model))
    if cfg.get('fixed_input_size', False):
        # create_model(img_size=...) is not in the cfg, and not every network keeps it.
        sides = [*own, tuple(full), *((side, side) for side in range(32, 1025, 32))]
    else:
        sides = [(min(64, full[0]), min(64, full[1])), tuple(full), *own]
    sizes = [(channels, *pair) for pair in sides for channels in _input_channels(model)]
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


Head = Callable[[Tensor], Tensor]


def _run_probe(model: nn.Module, names: list[str], head: Head | None = None) -> _Probe:
    """One forward of an image of the first size that the model takes.

    Args:
        model: The network.
        names: The modules to visit.
        head: A head whose gradients tell `last_seen`.
    """
    failure: Exception | None = None
    for size in _image_sizes(model):
        try:
            return _run_image(model, names, size, head)
        except _PROBE_ERRORS as error:
            failure = failure or error
    sizes = ', '.join(f'{height} x {width}' for _, height, width in _image_sizes(model)[:3])
    raise ValueError(f'{type(model).__name__} takes no image of {sizes} or other sizes, so its stages cannot be found: '
                     f'{failure}') from failure


def _run_image(model: Any, names: list[str], size: tuple[int, int, int], head: Head | None = None) -> _Probe:
    visits: list[_Visit] = []
    thread = threading.get_ident()

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def visit(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread:  # not another thread's forward of the same model
                visits.append(_Visit(name, output))
        return visit

    handles = [hook_target(model.get_submodule(name)).register_forward_hook(hook(name)) for name in names]
    forward = getattr(model, 'forward_features', model)
    images = torch.zeros(1, *size, **_placement(model))
    try:
        if head is None:
            return _Probe(size[1:], visits, forward(images))
        with torch.enable_grad():
            images = torch.arange(images.numel(), device=images.device).sin().to(images.dtype).view_as(images)
            features = forward(images.requires_grad_())
            return _Probe(size[1:], visits, features, _last_seen(visits, head(features)))
    finally:
        for handle in handles:
            handle.remove()


def _last_seen(visits: list[_Visit], output: Tensor) -> str | None:
    """Name of the last visit whose locations have a gradient of a head's output."""
    # Different weights: the sum of a LayerNorm's output is constant.
    weights = torch.arange(1., output.numel() + 1, device=output.device).cos().to(output.dtype)
    score = (output.flatten() * weights).sum()
    for visit in reversed(visits):
        if visit.features is None:
            continue
        gradient, = torch.autograd.grad(score, [visit.features], retain_graph=True, allow_unused=True)
        if gradient is not None and gradient.is_meta:
            return None
        # A class token has a gradient at one place alone.
        if gradient is not None and (gradient.abs().sum(-1) > 0).sum() > gradient.shape[1] // 2:
            return visit.name
    return None
