"""Stages of a network, found by the forwards of `probe`: their modules, their layouts, and how the head pools.

Letters: B images, D channels, H x W locations, N tokens, l a stage from 0 to L.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import torch
from timm.models import ConvNeXt, HighResolutionNet, MultiScaleVit, ResNet, Twins
from torch import Tensor, nn

from .architectures import has_raster_tokens, why_unsupported_model
from .layout import NCHW, NHWC, ImageSize, Layout, Stage, Tokens
from .probe import (
    PROBE_ERRORS,
    ModuleOutput,
    Probe,
    eval_mode,
    hook_target,
    input_channels,
    placement,
    run_image,
    run_probe,
    shape_text,
)
from .wrappers import class_scores

# Name of the pooled stage where it is the output of no named module.
POOLED = 'forward_features'

# Networks whose feature_info names other modules than those that give the stages.
NAMED_STAGES: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    # The paper's: feature_info has `act1` for ResNet, whose F_0 is after the max pooling, and no stem for ConvNeXt.
    (ResNet, ('maxpool', 'layer1', 'layer2', 'layer3', 'layer4')),
    (ConvNeXt, ('stem', 'stages.0', 'stages.1', 'stages.2', 'stages.3')),
    # feature_info has names that are no modules of these.
    (HighResolutionNet, ('incre_modules.0', 'incre_modules.1', 'incre_modules.2', 'incre_modules.3', 'final_layer')),
    (MultiScaleVit, ('stages.0', 'stages.1', 'stages.2', 'stages.3')),
    (Twins, ('blocks.0', 'blocks.1', 'blocks.2', 'blocks.3')),
)

# Default stages of a network whose blocks all have one resolution.
MAX_DEFAULT_STAGES = 5


class HeadPooling(StrEnum):
    """How a head pools the tensor that it gets."""

    AVERAGE = 'avg'
    MAXIMUM = 'max'
    AVERAGE_AND_MAXIMUM = 'avgmax'
    CLASS_TOKEN = 'token'
    ALL_TOKENS = 'tokens'  # the average takes in the prefix tokens
    NONE = ''  # the head hands the map on, as after `reset_classifier(0, '')`
    UNKNOWN = 'unknown'


def find_stages(model: nn.Module, names: Sequence[str] | None = None) -> tuple[tuple[Stage, ...], HeadPooling]:
    """Finds the stages of a timm model by one small forward, and how its head pools the last one.

    Args:
        model: A timm model without a stream.
        names: Module names in the order in which they run, or None for the default stages.

    Returns:
        The stages in the order in which they run. The last one is the tensor that the model pools. And how it is pooled.

    Raises:
        ValueError: If the model pools no feature map by average or maximum, or a name does not fit.
    """
    kind = type(model).__name__
    # Of the class: torch.compile's wrapper shows the attributes of the model inside.
    if not _has_timm_methods(model):
        inside = next((m for m in model.modules() if m is not model and _has_timm_methods(m)), None)
        if inside is not None:
            raise ValueError(
                f'This {kind} holds a {type(inside).__name__}: call timm_castream.attach on the {type(inside).__name__} '
                'first, and wrap or compile it afterwards.'
            )
        raise ValueError(
            f'{kind} is no timm classification model: it lacks forward_features, forward_head or reset_classifier.'
        )
    if why_unsupported_model(model):
        raise ValueError(f'{kind} takes no CA-Stream: {why_unsupported_model(model)}.')
    if not isinstance(names, (list, tuple, type(None))):
        raise ValueError(f'stream_stages {names!r} is no list of module names, for example {_default_names(model)}.')
    chosen = _default_names(model) if names is None else list(names)
    if names is not None:
        _check_names(model, chosen)
    with eval_mode(model):
        probe = run_probe(model, chosen)
        pooled = _pooled_stage(model, probe)
        head: Any = model.forward_head
        pooling = head_pooling(model, pooled, head)
        if pooling is HeadPooling.UNKNOWN:
            raise ValueError(
                f'The head of {kind} does not pool by average, by maximum or by a class token, so a CA-Stream cannot '
                'take that place.'
            )
        visits = list(probe.visits)
        if names is None:
            last_name = chosen[-1] if chosen else POOLED
            visits = [visit for visit in visits if visit.name != last_name and not visit.unusable_because(model)]
        else:
            for visit in visits:
                if visit.unusable_because(model):
                    raise ValueError(visit.unusable_because(model))
            if [v.name for v in visits] != chosen:
                raise ValueError(
                    f'stream_stages {chosen} must be modules that {kind} runs once, before its head, and '
                    f'in the order in which it runs them: {[v.name for v in visits]}.'
                )
            last_name = visits.pop().name if visits[-1].output is probe.features else POOLED
        stages = [*(_stage(model, probe, visit) for visit in visits), Stage(last_name, pooled.dim, pooled.layout)]
    if any(isinstance(stage.layout, Tokens) for stage in stages) and not has_raster_tokens(model):
        raise ValueError(
            f'{kind} gives patch tokens, (B, N, D), and the order of its tokens is unknown: a CA-Stream '
            'takes token networks of timm alone.'
        )
    return tuple(stages), pooling


def _has_timm_methods(model: nn.Module) -> bool:
    return all(hasattr(type(model), name) for name in ('forward_features', 'forward_head', 'reset_classifier'))


def find_stage(model: nn.Module, name: str) -> Stage:
    """The stage of one module: of a timm model, with a stream or without, or of any network for images.

    Raises:
        ValueError: If there is no such module, it does not run once before the pooling, or it gives no feature map.
    """
    kind = type(model).__name__
    if not isinstance(name, str):
        named = next((f': {own!r}' for own, module in model.named_modules() if own and module is name), '')
        raise ValueError(f'layer takes the name of a module of {kind}, not a {type(name).__name__}{named}.')
    if not has_module(model, name):
        children = ', '.join(child for child, _ in model.named_children())
        raise ValueError(f'layer {name!r} is no module of {kind}; it has {children} and their submodules.')
    with eval_mode(model):
        probe = run_probe(model, [name])
        if not probe.visits:
            names = _default_names(model) or [child for child, _ in model.named_modules() if child]
            valid = [visit.name for visit in run_probe(model, names).visits if not visit.unusable_because(model, False)]
            way_out = (
                f'name a module that runs once before it, for example {valid[-1]!r}'
                if valid
                else ('no other module does run either, as in a traced or an exported network: give the network itself')
            )
            raise ValueError(f'layer {name!r} of {kind} runs after the pooling or not at all: {way_out}.')
        if len(probe.visits) != 1:
            raise ValueError(
                f'layer {name!r} of {kind} runs {len(probe.visits)} times before the pooling: name a '
                'module that runs once.'
            )
        problem = probe.visits[0].unusable_because(model, in_place=False)
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
        return _pooled_stage(model, run_probe(model, []))


def has_one_location(model: nn.Module, size: tuple[int, int, int]) -> bool:
    """Whether the tensor that a timm model pools has one location, for an image of a size (3, H, W)."""
    try:
        layout = pooled_stage(model).layout
        with eval_mode(model):
            features = run_image(model, [], size).features
        return layout.to_nchw(layout.tensor(features), size[1:]).shape[2:] == (1, 1)
    except PROBE_ERRORS:  # who needs the stage is told why there is none
        return False


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
    if head_pooling(model, pooled, head) is not HeadPooling.CLASS_TOKEN:
        return None
    names = _last_blocks(model)
    with eval_mode(model):
        probe = run_probe(model, names, lambda features: head(features, pre_logits=True))
    if probe.layers_with_gradient is None:  # the meta device has no gradients
        return names[-2] if len(names) > 1 else None
    return probe.layers_with_gradient[-1] if probe.layers_with_gradient else None


def layers_with_gradient(model: nn.Module, names: list[str], whole: bool) -> list[str]:
    """Those modules whose patch tokens or feature maps have a gradient of the class scores, in the order of their runs.

    Args:
        model: The model, or a module that holds it.
        names: Names of modules.
        whole: Run the model's own forward, and not the two halves of timm's.
    """
    backbone: Any = model
    with eval_mode(model):
        if whole:
            probe = run_probe(model, names, lambda output: class_scores(output, 1, type(model).__name__), model)
        else:
            head = getattr(backbone, 'forward_gap_head', getattr(backbone, 'forward_head', None))
            probe = run_probe(model, names, head)
    return names if probe.layers_with_gradient is None else probe.layers_with_gradient


def nearest_layer_with_gradient(model: nn.Module, whole: bool) -> str | None:
    """The last block, or else the last module, through which class scores depend on the image; None without any."""
    modules = [name for name, _ in model.named_modules() if name]
    blocks = [name for name in modules if name.rpartition('.')[2].isdecimal()]
    for names in (blocks, modules):
        found = layers_with_gradient(model, names, whole)
        if found:
            return found[-1]
    return None


def head_pooling(model: nn.Module, pooled: Stage, head: Callable[..., Tensor]) -> HeadPooling:
    """How a head pools.

    The head is given a map, and maps of one location that hold the average or the maximum of the first: equal outputs
    tell how it pools.

    Args:
        model: A timm model.
        pooled: Its pooled stage.
        head: Its own `forward_head`.

    Returns:
        The pooling. On the meta device no values can be compared: `CLASS_TOKEN` or `AVERAGE` as the model's
        `global_pool` says.
    """
    layout = pooled.layout
    with eval_mode(model):
        if head(pooled.one_location(torch.zeros(1, pooled.dim, **placement(model))), pre_logits=True).ndim > 2:
            return HeadPooling.NONE
        features = torch.linspace(0, 100, 18 * pooled.dim, dtype=torch.float32).sin().reshape(2, pooled.dim, 3, 3)
        features = features.to(**placement(model))
        mean, peak = features.mean((2, 3)), features.amax((2, 3))
        prefix = -peak
        output = head(layout.from_nchw(features, prefix), pre_logits=True)
        if output.is_meta:
            is_token = getattr(model, 'global_pool', None) == 'token'
            return HeadPooling.CLASS_TOKEN if is_token else HeadPooling.AVERAGE
        alike = [
            (HeadPooling.AVERAGE, pooled.one_location(mean)),
            (HeadPooling.MAXIMUM, pooled.one_location(peak)),
            (HeadPooling.AVERAGE_AND_MAXIMUM, pooled.one_location((mean + peak) / 2)),
        ]
        if isinstance(layout, Tokens) and layout.num_prefix:
            count = layout.num_prefix
            alike += [
                # other channels: a norm may undo a shift
                (HeadPooling.CLASS_TOKEN, layout.from_nchw(features.roll(1, 1), prefix)),
                (HeadPooling.ALL_TOKENS, pooled.one_location((9 * mean + count * prefix) / (9 + count))),
            ]
        tolerance = 1e-4 if output.dtype in (torch.float32, torch.float64) else 2e-2
        for pooling, other in alike:
            if torch.allclose(output, head(other, pre_logits=True), rtol=tolerance, atol=tolerance):
                return pooling
    return HeadPooling.UNKNOWN


def has_module(model: nn.Module, name: str) -> bool:
    """Whether a model has a module of that name."""
    try:
        return bool(name) and model.get_submodule(name) is not None  # '' would be the model
    except (AttributeError, RuntimeError):  # the latter for a frozen script
        return False


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
    """The modules of timm's `feature_info`."""
    modules = dict(model.named_modules())
    names = []
    for info in getattr(model, 'feature_info', None) or []:
        name = info.get('module', '')
        if name not in modules and f'encoder.{name}' in modules:  # gemma4_vit has the names of its encoder
            name = f'encoder.{name}'
        if name and name in modules:  # some of timm's tables name a module that is none, or '', the whole model
            names.append(_resolved(model, name))
    return names


def _last_blocks(model: nn.Module) -> list[str]:
    """The stages, the blocks beside the last stage, and the blocks in it."""
    named = [row for kind, row in NAMED_STAGES if isinstance(model, kind)]
    names = [_resolved(model, name) for name in named[0]] if named else _block_names(model)
    if not names:
        return []
    lists = (nn.ModuleList, nn.Sequential)
    parent = names[-1].rpartition('.')[0]
    children = [
        (parent, model.get_submodule(parent)),
        *((f'{names[-1]}.{name}', child) for name, child in model.get_submodule(names[-1]).named_children()),
    ]
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
            raise ValueError(
                f'{name!r} in stream_stages is no module of {type(model).__name__}; its stages are '
                f'{", ".join(_default_names(model))}.'
            )
    if not names or len({hook_target(modules[name]) for name in names}) < len(names):
        raise ValueError(
            f'stream_stages {names} must name one or more different stages of {type(model).__name__}, for '
            f'example {_default_names(model)}.'
        )


def _pooled_stage(model: nn.Module, probe: Probe) -> Stage:
    visit = ModuleOutput(POOLED, probe.features)
    if visit.features is None or visit.item is not None:
        raise ValueError(
            f'{type(model).__name__} pools no feature map: its forward_features gives '
            f'{shape_text(probe.features)}, a CA-Stream needs (B, D, H, W), (B, H, W, D) or patch tokens '
            '(B, N, D).'
        )
    return _stage(model, probe, visit)


def _stage(model: nn.Module, probe: Probe, visit: ModuleOutput) -> Stage:
    assert visit.features is not None  # unusable_because() comes first
    find = _map_layout if visit.features.ndim == 4 else _token_layout
    layout = find(model, probe, visit)
    return Stage(visit.name, layout.to_nchw(visit.features).shape[1], layout)


def _map_layout(model: nn.Module, probe: Probe, visit: ModuleOutput) -> Layout:
    """Whether the channels of a map come before its locations or after them.

    Locations follow the sides of the image. Where both readings do, a second image of twice the size tells: its map has
    as many channels and other sides.
    """
    shape = visit.output.shape
    first, last = _is_grid(shape[2:], probe.image_size), _is_grid(shape[1:3], probe.image_size)
    if first == last:
        height, width = probe.image_size
        channels = input_channels(model)[0]
        try:
            second = run_image(model, [] if visit.name == POOLED else [visit.name], (channels, 2 * height, 2 * width))
            other = second.features if visit.name == POOLED else second.visits[0].output
            first, last = other.shape[3] != shape[3], other.shape[1] != shape[1]
        except PROBE_ERRORS:  # a network of one image size
            last = getattr(model, 'output_fmt', 'NCHW') == 'NHWC'
            first = not last
    return NCHW() if first and not last else NHWC()


def _token_layout(model: nn.Module, probe: Probe, visit: ModuleOutput) -> Layout:
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
    raise ValueError(
        f'{visit.name} of {type(model).__name__} gives {count} tokens, which are no grid of an image of '
        f'{height} x {width} pixels.'
    )


def _windows(model: nn.Module, name: str) -> tuple[tuple[int, int], ...]:
    """The windows by which timm's Hiera sorts the tokens that a block gives."""
    schedule = getattr(getattr(model, 'reroll', None), 'schedule', None)
    if not isinstance(schedule, dict):
        return ()
    block = str(max(schedule)) if name == POOLED else name.removeprefix('blocks.')
    if not block.isdecimal():
        raise ValueError(
            f'{name} of {type(model).__name__} may give tokens in another order: name one of its blocks, '
            f'blocks.0 to blocks.{max(schedule)}.'
        )
    return tuple(tuple(sides) for sides in schedule[int(block)][0])


def _is_grid(sides: Sequence[int], image_size: ImageSize) -> bool:
    """Whether two sides follow those of an image, up to rounding by one location."""
    (rows, columns), (height, width) = sides, image_size
    return abs(rows * width - columns * height) < max(height, width)
