"""The network under explanation: any module that maps images to logits, with a CA-Stream or without.

`Predictor` decides once what attributions, curves and metrics share: the poolings, the
normalisation of the images, the activation, the batch size, the memory format and the layer.

Letters: B images, N images of any number, C classes, H x W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._utils.checks import check_count, check_names
from ..attach import POOLINGS, forward_both, pooling
from ..backbones.layout import Stage
from ..backbones.mixin import CAStreamMixin, castream_model
from ..backbones.probe import eval_mode, first_convolution, input_channels
from ..backbones.stages import cam_layer, find_stage, pooled_stage
from .images import default_batch_size, fast_memory_format, mask_normalised, normalisation
from .probabilities import ACTIVATIONS, probabilities


class Predictor:
    """A network with the settings of one explanation or evaluation.

    Args:
        model: A model with a stream, any timm model, or any module that gives (N, C) logits.
        poolings: Of `'gap'` and `'ca'`. None: both for a model with a stream. A model without a stream has `'gap'`
            alone, which is its own forward.
        layer: Name of the module whose output the CAM methods read. None: the tensor that the model pools, or the input
            of the last block where it reads a class token.
        activation: `'softmax'`, or `'sigmoid'` for multi-label models.
        batch_size: Images of one forward. None: `images.default_batch_size`.
        channels_last: Use this memory format on every device. It is used on CPUs in any case.
        torchcompile: Compile the forwards of masked and perturbed images.
        mean, std: Normalisation of the images, one number a channel. None: those of the model's `pretrained_cfg`.
        temperatures: {pooling: positive number} that divides the logits before the activation. None: 1.

    Attributes:
        backbone: The model inside its wrappers.
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
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        temperatures: Mapping[str, float] | None = None,
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
        self.backbone: Any = castream_model(model) if self.has_stream else _unwrapped(model)
        self.poolings = tuple(poolings)
        self.layer = layer
        self.activation = activation
        self.temperatures = dict(temperatures or {})
        self._batch_size = batch_size
        self._channels_last = channels_last
        self._mean, self._std = mean, std
        self._torchcompile = torchcompile
        self._forward: Callable[[Tensor], Tensor] = torch.compile(model) if torchcompile else model
        self._forward_both: Callable[..., dict[str, Tensor]] = (
            torch.compile(forward_both) if torchcompile else forward_both
        )

    @property
    def name(self) -> str:
        """Name of the model's class."""
        return type(self.backbone).__name__

    def calibrated(self, temperatures: Mapping[str, float] | None) -> Predictor:
        """The same network whose probabilities have other temperatures."""
        other = copy.copy(self)
        other.temperatures = dict(temperatures or {})
        return other

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients inside, each module's own mode afterwards."""
        with eval_mode(self.model):
            yield

    @property
    def num_classes(self) -> int | None:
        """C, or None where the model has no attribute of that name."""
        return getattr(self.backbone, 'num_classes', None)

    @property
    def is_timm(self) -> bool:
        """Whether the model has the two halves of timm's forward, `forward_features` and `forward_head`."""
        return all(hasattr(self.backbone, name) for name in ('forward_features', 'forward_head', 'num_classes'))

    @property
    def halves_are_forward(self) -> bool:
        """Whether the two halves of timm's forward give the model's own logits.

        They do not for a wrapper that changes the images or the logits, nor for a subclass with a forward of its own.
        """
        if not self.is_timm:
            return True
        own = type(self.backbone).forward.__module__.partition('.')[0] == 'timm'
        return own and _unwrapped(self.model) is self.backbone

    @cached_property
    def cam_layer(self) -> str | None:
        """Name of the module whose output the CAM methods read, or None for the tensor that the model pools."""
        return cam_layer(self.backbone) if self.layer is None and self.is_timm else self.layer

    @property
    def device(self) -> torch.device:
        """The device of the weights, or the CPU for a module without any."""
        return next((t.device for t in chain(self.model.parameters(), self.model.buffers())), torch.device('cpu'))

    def check_channels(self, images: Tensor) -> None:
        """Raises ValueError where a timm model takes images of another number of channels.

        The first convolution has the number, unless the network turns pixels into channels before it.
        """
        if not self.is_timm or first_convolution(self.backbone) is None:
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

    @cached_property
    def stage(self) -> Stage:
        """The feature map that the CAM methods read."""
        return pooled_stage(self.backbone) if self.cam_layer is None else find_stage(self.backbone, self.cam_layer)

    @property
    def has_feature_maps(self) -> bool:
        """Whether the CAM methods can read feature maps: those of a timm model, or of a named layer."""
        return self.is_timm or self.layer is not None

    def pooled_by(self, name: str) -> AbstractContextManager[None]:
        """Sets the model to a pooling inside the context."""
        return pooling(self.model, name) if self.has_stream else nullcontext()

    def batch_size(self, images: Tensor) -> int:
        """Images of one forward, for images of this size."""
        return self._batch_size or default_batch_size(images)

    def memory_format(self, images: Tensor) -> torch.memory_format:
        """The memory format in which the images are forwarded."""
        return torch.channels_last if self._channels_last else fast_memory_format(images)

    def forward(self, images: Tensor) -> Tensor:
        """The model's own forward, under the pooling that the model is set to: (N, C) logits of one batch."""
        return self._forward(self._prepared(images))[: len(images)]

    def logits(self, images: Tensor, poolings: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Logits of one batch under each pooling, from one pass over the backbone.

        Args:
            images: (N, channels, H, W), N of at most `batch_size`.
            poolings: None: those of the network.

        Returns:
            {pooling: (N, C)}.
        """
        poolings = self.poolings if poolings is None else poolings
        if len(poolings) == 1:
            with self.pooled_by(poolings[0]):
                return {poolings[0]: self.forward(images)}
        both = self._forward_both(self.model, self._prepared(images))
        return {name: both[name][: len(images)] for name in poolings}

    def _prepared(self, images: Tensor) -> Tensor:
        """One batch in the network's memory format, filled up with zeros to the batch size for a compiled network."""
        if self._torchcompile:  # another number of images or another memory format would compile another graph
            images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, self.batch_size(images) - len(images)))
        return images.contiguous(memory_format=self.memory_format(images))

    def all_logits(self, images: Tensor, poolings: Sequence[str] | None = None) -> dict[str, Tensor]:
        """`logits` of any number of images, in batches."""
        parts = [self.logits(part, poolings) for part in images.split(self.batch_size(images))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def probabilities(self, logits: Tensor, name: str | None = None) -> Tensor:
        """Probabilities, (N, C) in float32 or wider, of logits under the pooling `name`."""
        return probabilities(logits, self.activation, self.temperatures.get(name, 1.0) if name else 1.0)

    def normalisation(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the images, as `images.normalisation` gives them."""
        return normalisation(self.backbone, images, self._mean, self._std)

    def mask(self, x: Tensor, saliency: Tensor) -> Tensor:
        """Images masked before normalisation by saliency maps of their size.

        Args:
            x: (N, channels, H, W) normalised images.
            saliency: (N, H, W) in [0, 1].
        """
        return mask_normalised(x, saliency[:, None].to(x.dtype), *self.normalisation(x))


def default_poolings(model: nn.Module) -> tuple[str, ...]:
    """Both poolings for a model with a stream, `('gap',)` for others."""
    return POOLINGS if has_stream(model) else POOLINGS[:1]


def has_stream(model: nn.Module) -> bool:
    """Whether the model, or a model inside a wrapper, has a stream."""
    return any(isinstance(module, CAStreamMixin) for module in model.modules())


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel or DistributedDataParallel."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, wrappers) else model
