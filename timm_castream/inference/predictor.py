"""The network under explanation: any module that maps images to class scores, with a CA-Stream or without.

`Predictor` decides once what attributions, curves and metrics share: the poolings, the
normalisation of the images, the activation, the batch size, the memory format and the layer.

Letters: B images, N images of any number, C classes, H x W pixels.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._utils.checks import ChannelNumbers, check_count, check_names
from ..attach import POOLINGS, both_logits, pooling
from ..backbones.freezing import is_norm
from ..backbones.layout import Stage
from ..backbones.mixin import CAStreamMixin, castream_model, outermost_streams
from ..backbones.probe import eval_mode, first_convolution, input_channels
from ..backbones.stages import (
    HeadPooling,
    cam_layer,
    find_stage,
    has_module,
    head_pooling,
    layers_with_gradient,
    nearest_layer_with_gradient,
    pooled_stage,
)
from ..backbones.wrappers import class_scores, images_inside, in_precision_of, unwrapped
from .images import Batches, default_batch_size, fast_memory_format, in_batches, mask_normalised, normalisation
from .probabilities import ACTIVATIONS, probabilities

if TYPE_CHECKING:
    from .engine import Engine

Score = Callable[[Tensor], Tensor]

_SUM_TOLERANCE = 1e-3  # of probabilities in half precision

_OWN_POOLINGS = {
    HeadPooling.AVERAGE: 'GAP',
    HeadPooling.MAXIMUM: 'max pooling',
    HeadPooling.AVERAGE_AND_MAXIMUM: 'average and max',
    HeadPooling.CLASS_TOKEN: 'class token',
    HeadPooling.ALL_TOKENS: 'token average',
}


class Predictor:
    """A network with the settings of one explanation or evaluation.

    Args:
        model: A model with a stream, any timm model, or any module whose output holds class scores, as
            `wrappers.class_scores` finds them. A wrapper around a model with a stream runs its own forward under both
            poolings. One logit an image gives two classes, 1 with the probability sigmoid(logit) and 0.
        poolings: Of `'gap'` and `'ca'`. None: both for a model with a stream. A model without a stream has `'gap'`
            alone, which is its own forward.
        layer: Name of the module whose output the CAM methods read. None: the tensor that the model pools, or the input
            of the last block where it reads a class token.
        activation: `'softmax'`, or `'sigmoid'` for multi-label models, one logit of which is one class.
        batch_size: Images of one forward. None: `images.default_batch_size`.
        channels_last: Use this memory format on every device. It is used on CPUs in any case.
        torchcompile: Compile the forwards of masked and perturbed images.
        mean, std: Normalisation of the images, one number a channel. None: those of the model's `pretrained_cfg`.
        temperatures: {pooling: positive number} that divides the logits before the activation. None: 1.
        score: Function from the output for one image, (C,), to the one number that is explained. Values of the images
            take the place of logits and of probabilities, (N, 1) with the class 0. None: class scores are explained.

    Attributes:
        backbone: The model with a stream inside the wrappers, or the model inside those that change nothing.
        poolings: The poolings, in order.

    Raises:
        ValueError: If a name is unknown, a number is out of range, or `'ca'` is asked for and there is no stream.
    """

    def __init__(
        self,
        model: nn.Module,
        poolings: Sequence[str] | None = None,
        *,
        layer: str | None = None,
        activation: str = 'softmax',
        batch_size: int | None = None,
        channels_last: bool = False,
        torchcompile: bool = False,
        mean: ChannelNumbers | None = None,
        std: ChannelNumbers | None = None,
        temperatures: Mapping[str, float] | None = None,
        score: Score | None = None,
    ) -> None:
        self.has_stream = has_stream(model)
        if poolings is None:
            poolings = default_poolings(model)
        check_names('pooling', poolings, POOLINGS)
        check_names('activation', (activation,), ACTIVATIONS)
        if batch_size is not None:
            check_count('batch_size', batch_size)
        self.model = model
        if 'ca' in poolings and not self.has_stream:
            try:
                castream_model(model)
            except ValueError as error:
                raise ValueError(f"{str(error).removesuffix('.')}, or choose pooling 'gap'.") from None
        self.inner = unwrapped(model)
        self.backbone: Any = castream_model(model) if self.has_stream else self.inner
        self.poolings = tuple(poolings)
        self.layer = layer
        self.activation = activation
        self.temperatures = dict(temperatures or {})
        self.score = score
        self._batch_size = batch_size
        self._channels_last = channels_last
        self._mean, self._std = mean, std
        self._changed: bool | None = None
        self._engine: Engine | None = None
        self._torchcompile = torchcompile
        self._forward: Callable[[Tensor], Any] = torch.compile(model) if torchcompile else model
        self._forward_both: Callable[..., dict[str, Tensor]] = (
            torch.compile(both_logits) if torchcompile else both_logits
        )

    @property
    def name(self) -> str:
        """Name of the model's class."""
        return type(self.inner).__name__

    def calibrated(self, temperatures: Mapping[str, float] | None) -> Predictor:
        """The same network whose probabilities have other temperatures."""
        other = copy.copy(self)
        other.temperatures = dict(temperatures or {})
        return other

    def accelerated(self, engine: Engine | None) -> Predictor:
        """The same network whose `logits` run in an engine, see `engine`."""
        other = copy.copy(self)
        other._engine = engine
        return other

    @property
    def is_compiled(self) -> bool:
        """Whether the forwards of masked and perturbed images are compiled by torch."""
        return self._torchcompile

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients inside, each module's own mode afterwards, and `alone`."""
        with self.alone(), eval_mode(self.model):
            yield

    def alone(self) -> AbstractContextManager[object]:
        """Keeps other threads from the network inside: poolings and hooks are set on its modules."""
        return _lock_of(self.backbone)

    @property
    def num_classes(self) -> int | None:
        """C, or None where the model has no attribute of that name."""
        if self.score is not None:
            return 1
        num_classes = getattr(self.inner, 'num_classes', None)
        return 2 if num_classes == 1 and self.activation == 'softmax' else num_classes

    @property
    def is_timm(self) -> bool:
        """Whether the backbone has the two halves of timm's forward, `forward_features` and `forward_head`."""
        return all(hasattr(self.backbone, name) for name in ('forward_features', 'forward_head', 'num_classes'))

    @property
    def halves_are_forward(self) -> bool:
        """Whether the two halves of timm's forward give the model's own logits.

        They do not for a wrapper that changes the images or the logits, nor for a subclass with a forward of its own.
        """
        backbone = self.backbone
        if not self.is_timm or self.inner is not backbone or 'forward' in vars(backbone):
            return False
        return type(backbone).forward.__module__.partition('.')[0] == 'timm'

    @cached_property
    def cam_layer(self) -> str | None:
        """Name of the module whose output the CAM methods read, or None for the tensor that the model pools."""
        return cam_layer(self.backbone) if self.layer is None and self.is_timm else self.layer

    @cached_property
    def norm_layer(self) -> str | None:
        """Name of the normalisation layer behind `cam_layer` where the model reads a class token, or None.

        The output of a normalisation does not depend on the length of a token. The product of a token with its gradient
        is therefore zero before it.
        """
        if self.layer is not None or self.cam_layer is None or not self.is_timm:
            return None
        norms = [name for name, module in self.backbone.named_modules() if is_norm(module)]
        found = layers_with_gradient(self.backbone, [self.cam_layer, *norms], whole=False)
        if self.cam_layer not in found:
            return None
        return next((name for name in found[found.index(self.cam_layer) :] if name in norms), None)

    def at_layer(self, layer: str) -> Predictor:
        """The same network whose CAM methods read another layer."""
        other = copy.copy(self)
        for name in ('cam_layer', 'stage', 'norm_layer'):
            vars(other).pop(name, None)
        other.layer = layer
        return other

    def owner_of(self, layer: str) -> nn.Module:
        """The module that a layer's name belongs to: the model, or the model with a stream inside it."""
        return self.inner if has_module(self.inner, layer) else self.backbone

    @property
    def device(self) -> torch.device:
        """The device of the weights, or the CPU for a module without any."""
        return next((t.device for t in chain(self.model.parameters(), self.model.buffers())), torch.device('cpu'))

    def check_channels(self, images: Tensor) -> None:
        """Raises ValueError where a timm model takes images of another number of channels.

        The first convolution has the number, unless the network turns pixels into channels before it.
        """
        if not self.halves_are_forward or first_convolution(self.backbone) is None:
            return
        channels, own = input_channels(self.backbone)
        if channels in (1, own) and images.shape[1] != channels:
            raise ValueError(f'x has {images.shape[1]} channels, {self.name} takes images of {channels}.')

    def check_needs(self, methods: Iterable[Any], x: Tensor) -> None:
        """Raises ValueError unless the network takes the images and has what methods need.

        Methods need a stream, feature maps and the normalisation.

        Args:
            methods: Rows of the table of methods.
            x: (B, 3, H, W) images.
        """
        self.check_channels(x)
        self.normalisation(x)
        for method in methods:
            method.check(self)
            if 'stream' in method.needs:
                castream_model(self.model)
            if 'feature maps' in method.needs and self.has_feature_maps:
                self.stage  # noqa: B018 it is found here, before long work
            if 'gradients' in method.needs and self.layer is not None:
                self.check_gradients()

    @cached_property
    def stage(self) -> Stage:
        """The feature map that the CAM methods read."""
        if self.cam_layer is not None:
            return find_stage(self.owner_of(self.cam_layer), self.cam_layer)
        streams = outermost_streams(self.inner)
        if len(streams) > 1:
            raise ValueError(
                f'{self.name} holds {len(streams)} models with a CA-Stream: name the module whose output gives the '
                'feature maps with layer=.'
            )
        return pooled_stage(self.backbone)

    @cached_property
    def pooling_names(self) -> dict[str, str]:
        """{pooling: its name in tables and pictures}: `'CA'`, and for the network's own what it pools by."""
        return {pooling: 'CA' if pooling == 'ca' else self._own_pooling() for pooling in self.poolings}

    def _own_pooling(self) -> str:
        backbone = self.backbone
        if not self.is_timm:
            return 'own pooling'
        head = getattr(backbone, 'forward_gap_head', backbone.forward_head)
        try:
            return _OWN_POOLINGS.get(head_pooling(backbone, pooled_stage(backbone), head), 'own pooling')
        except ValueError:  # it pools no feature map
            return 'own pooling'

    @cached_property
    def has_graph(self) -> bool:
        """Whether gradients pass through the weights: not through those made under torch.inference_mode."""
        return not any(parameter.is_inference() for parameter in self.model.parameters())

    def recording(self) -> AbstractContextManager[Any]:
        """Records a graph inside, where the weights allow one."""
        return torch.enable_grad() if self.has_graph else nullcontext()

    def check_gradients(self) -> None:
        """Raises ValueError if the class scores do not depend on the locations of the layer: gradients are zero there."""
        layer, whole = self.cam_layer, not self.halves_are_forward
        if layer is None:
            return
        owner = self.owner_of(layer)
        if layer in layers_with_gradient(owner, [layer], whole or owner is not self.backbone):
            return
        works = nearest_layer_with_gradient(owner, whole or owner is not self.backbone)
        if self.is_timm and owner is self.backbone:
            works = cam_layer(self.backbone) or works
        raise ValueError(
            f'No gradient of the class scores of {self.name} reaches the locations of layer {layer!r}, which nothing '
            f'reads after it, so gradient methods give zeros{f": name layer {works!r}" if works else ""}.'
        )

    @property
    def has_feature_maps(self) -> bool:
        """Whether the CAM methods can read feature maps: those of a timm model, or of a named layer."""
        return self.is_timm or self.layer is not None

    def pooled_by(self, name: str) -> AbstractContextManager[None]:
        """Sets the model to a pooling inside the context."""
        return pooling(self.model, name) if self.has_stream else nullcontext()

    def batch_size(self, images: Tensor) -> int:
        """Images of one forward in torch, for images of this size."""
        return self._batch_size or default_batch_size(images)

    def batches(self, images: Tensor) -> Batches:
        """Calls a function that makes images of this size from rows and forwards them, with a forward's rows at a time.

        In an engine the calls run side by side, in its threads.
        """
        if self._engine is not None and self._engine.takes(images):
            return self._engine.batches
        return in_batches(self.batch_size(images))

    def memory_format(self, images: Tensor) -> torch.memory_format:
        """The memory format in which the images are forwarded."""
        return torch.channels_last if self._channels_last else fast_memory_format(images)

    def to_mask(self, images: Tensor) -> Tensor:
        """Images in the memory format in which `logits` takes what is made of them: masking keeps the format."""
        in_engine = self._engine is not None and self._engine.takes(images)
        return images.contiguous(memory_format=torch.contiguous_format if in_engine else self.memory_format(images))

    def forward(self, images: Tensor) -> Tensor:
        """The model's own forward, under the pooling that the model is set to: (N, C) logits of one batch."""
        prepared = self._prepared(images)
        return self.as_classes(self.scores_in(self._call(prepared), len(prepared))[: len(images)])

    def _call(self, prepared: Tensor) -> Any:
        try:
            return self._forward(prepared)
        except AssertionError as error:  # of a network for images of one size
            height, width = prepared.shape[-2:]
            raise ValueError(f'{self.name} takes no images of {height} x {width} pixels: {error}') from error

    def scores_in(self, output: Any, count: int) -> Tensor:
        """The class scores in an output of the model for N images, (N, C)."""
        return class_scores(output, count, self.name)

    def as_classes(self, scores: Tensor) -> Tensor:
        """(N, C) logits of at least two classes: one logit z becomes (-z / 2, z / 2), whose softmax is its sigmoid.

        With a `score` the (N, 1) values that it gives.
        """
        if self.score is not None:
            return self._values(scores)
        return torch.cat([-scores / 2, scores / 2], 1) if self.is_one_logit(scores) else scores

    def is_one_logit(self, scores: Tensor) -> bool:
        """Whether the model answers yes or no by one logit."""
        return scores.shape[1] == 1 and self.activation == 'softmax' and self.score is None

    def check_scores(self, logits: Mapping[str, Tensor]) -> None:
        """Raises ValueError where a network ends in a softmax or a sigmoid, of which another one would be taken.

        Args:
            logits: {pooling: (N, C)} as `as_classes` gives them.
        """
        if self.halves_are_forward or self.score is not None:
            return
        for scores in logits.values():
            ends_in = None
            if self.activation == 'softmax' and scores.shape[1] > 1:
                sums = scores.sum(1)
                if scores.min() >= 0 and (sums - 1).abs().max() < _SUM_TOLERANCE:
                    ends_in = 'softmax'
                scores = scores.diff(dim=1) if scores.shape[1] == 2 and not sums.any() else scores  # one logit again
            if isinstance(list(self.inner.modules())[-1], nn.Sigmoid) and scores.min() >= 0 and scores.max() <= 1:
                ends_in = 'sigmoid'
            if ends_in:
                logarithm = 'their log()' if ends_in == 'softmax' else 'their logit()'
                raise ValueError(
                    f'{self.name} gives probabilities, and class scores before the {ends_in} are needed: give the network '
                    f'without its {ends_in}, or return {logarithm}.'
                )

    def _values(self, outputs: Tensor) -> Tensor:
        values = torch.stack([self._value(output) for output in outputs])
        return _Constant.apply(outputs, values) if outputs.requires_grad and not values.requires_grad else values

    def _value(self, output: Tensor) -> Tensor:
        assert self.score is not None
        given = f'target as a function gets the output for one image, {tuple(output.shape)}, and '
        try:
            value: Any = self.score(output)
        except Exception as error:
            raise ValueError(f'{given}raised {type(error).__name__}: {error}') from error
        if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
            return value.reshape(1)
        got = type(value).__name__
        if isinstance(value, Tensor):
            got = str(tuple(value.shape)) if value.numel() != 1 else f'one of {value.dtype}'
        raise ValueError(f'{given}must give a tensor of one floating-point number, got {got}.')

    def logits(self, images: Tensor, poolings: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Logits of one batch of masked or perturbed images under each pooling, from one pass over the backbone, or one
        a pooling of a wrapper.

        Args:
            images: (N, channels, H, W), as many as `batches` gives rows at a time.
            poolings: None: those of the network.

        Returns:
            {pooling: (N, C)}.
        """
        if self._engine is not None and self._engine.takes(images):
            return self._engine.logits(images, self.poolings if poolings is None else poolings)
        return self.torch_logits(images, poolings)

    def torch_logits(self, images: Tensor, poolings: Sequence[str] | None = None) -> dict[str, Tensor]:
        """`logits`, in torch whatever the engine."""
        poolings = self.poolings if poolings is None else poolings
        if len(poolings) == 1 or not self.halves_are_forward:
            logits = {}
            for name in poolings:
                with self.pooled_by(name):
                    logits[name] = self.forward(images)
            return logits
        both = self._forward_both(self.backbone, self._prepared(images))
        return {name: self.as_classes(both[name][: len(images)]) for name in poolings}

    def _prepared(self, images: Tensor) -> Tensor:
        """One batch in the network's memory format and precision, filled up to the batch size for a compiled network."""
        if self._torchcompile:  # another number of images or another memory format would compile another graph
            images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, self.batch_size(images) - len(images)))
        return in_precision_of(self.inner, images).contiguous(memory_format=self.memory_format(images))

    def all_logits(self, images: Tensor, poolings: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Logits of any number of images that no map has changed, in batches, in torch."""
        parts = [self.torch_logits(part, poolings) for part in images.split(self.batch_size(images))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def probabilities(self, logits: Tensor, name: str | None = None) -> Tensor:
        """Probabilities, (N, C) in float64, of logits under the pooling `name`; with a `score` its values."""
        if self.score is not None:
            return logits.double()
        return probabilities(logits, self.activation, self.temperatures.get(name, 1.0) if name else 1.0)

    def normalisation(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the images, as `images.normalisation` gives them.

        Raises:
            ValueError: As `images.normalisation`, or if they are not given for a wrapper that changes the images.
        """
        source = self.inner if getattr(self.inner, 'pretrained_cfg', None) else self.backbone
        given = self._mean is not None and self._std is not None
        if source is not self.inner and not given and self._changes_images(images):
            raise ValueError(
                f'{self.name} changes its images before the {type(self.backbone).__name__} inside it: pass mean= and '
                'std= of the images that it takes, (0,) and (1,) for pixels in [0, 1].'
            )
        return normalisation(source, images, self._mean, self._std)

    def _changes_images(self, images: Tensor) -> bool:
        """Whether a wrapper gives other images than its own to the model inside it."""
        if self._changed is None:
            ramp = torch.linspace(-2, 2, images[:1].numel(), device=images.device).view_as(images[:1]).to(images.dtype)
            with self.evaluating():
                inside = images_inside(self.inner, self.backbone, in_precision_of(self.inner, ramp))
            self._changed = inside.shape != ramp.shape or not torch.allclose(inside.to(ramp), ramp, atol=1e-2)
        return self._changed

    def mask(self, x: Tensor, saliency: Tensor) -> Tensor:
        """Images masked before normalisation by saliency maps of their size.

        Args:
            x: (N, channels, H, W) normalised images.
            saliency: (N, H, W) in [0, 1].
        """
        return mask_normalised(x, saliency[:, None].to(x.dtype), *self.normalisation(x))


class _Constant(torch.autograd.Function):
    """Values of a function that keeps no graph. A method that asks for their gradient is told so."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise ValueError(
            'target as a function gives numbers without a gradient, as after detach() or of a constant: compute them '
            'from the output by functions of torch, or take a method without gradients such as score_cam.'
        )


_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_lock_of_locks = threading.Lock()


def _lock_of(model: nn.Module) -> threading.RLock:
    with _lock_of_locks:
        return _locks.setdefault(model, threading.RLock())


def default_poolings(model: nn.Module) -> tuple[str, ...]:
    """Both poolings for a model with a stream, `('gap',)` for others."""
    return POOLINGS if has_stream(model) else POOLINGS[:1]


def has_stream(model: nn.Module) -> bool:
    """Whether the model, or a model inside a wrapper, has a stream.

    Raises:
        ValueError: If the model is no module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f'The model must be a torch.nn.Module, got {type(model).__name__}: put it into one.')
    return any(isinstance(module, CAStreamMixin) for module in model.modules())
