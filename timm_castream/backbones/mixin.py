"""Runs a CA-Stream beside a timm backbone and gives its last query to the backbone's own head in place of GAP.

A network that carries a stream is still of its backbone's class, through a mixin and a subclass cached per class, as
PyTorch's own parametrizations do it. `forward_features` opens a stream pass. The forward hook of each stage runs its
block while a pass is open. The query travels on the returned feature map to `forward_head`, which runs the last block
and hands the untouched head a map of one location that holds the query. Averaging one location changes nothing; in a
class-token network the query takes the place of the class token. Whatever the head does before or after its pooling stays as it was.

Letters: B images, C classes, D channels, H x W locations, l a stage from 0 to L.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..stream import CAStream
from .freezing import freeze_norms, unfreeze
from .layout import Stage
from .probe import hook_target
from .stages import HeadPooling, head_pooling
from .stream_config import StreamConfig
from .stream_pass import StageHook, StreamPass, run_with

KEY_PREFIX = 'castream.'  # of the stream's entries in a state dict


@dataclass
class Attachment:
    """The state of a model with a stream, apart from the stream itself. Only this module writes it.

    Attributes:
        config: The `stream_*` arguments of `attach`.
        stages: The stages from `stream_start` on. The last one is the pooled tensor and has no hook.
        head_pools: False while the head hands the map on unpooled, as after `reset_classifier(0, '')`.
        pooling: `'ca'` or `'gap'`.
        frozen: Whether the backbone is frozen.
        frozen_names: Parameters that trained before they were frozen.
        labels: (B,) class indices for a class specific stream, or None.
        restore: Attributes that `remove_stream` gives back.
    """

    config: StreamConfig
    stages: tuple[Stage, ...]
    head_pools: bool = True
    pooling: str = 'ca'
    frozen: bool = False
    frozen_names: tuple[str, ...] = ()
    labels: Tensor | None = None
    restore: dict[str, Any] = field(default_factory=dict)

    @property
    def uses_stream(self) -> bool:
        """Whether the model's own forward pools by the stream."""
        return self.pooling == 'ca' and self.head_pools


if TYPE_CHECKING:

    class _Backbone(nn.Module):
        num_classes: int
        num_features: int
        pretrained_cfg: Any
        default_cfg: Any

        def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...
        def forward_head(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...
        def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any: ...
        def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None: ...
        def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]: ...
else:
    _Backbone = nn.Module


class CAStreamMixin(_Backbone):
    """Adds a stream to a timm model: `attach` makes it the first base of the model's class, before the backbone's own.

    Attributes:
        castream: The `CAStream`.
    """

    castream: CAStream
    _castream: Attachment

    @property
    def castream_config(self) -> dict[str, Any]:
        """The stream's keyword arguments, `stream_*`, as plain data: `attach` with them makes an equal stream."""
        return self._castream.config.to_dict()

    @property
    def castream_stages(self) -> tuple[str, ...]:
        """Names of the stages that the stream visits, in order. The output of the last one is pooled."""
        return tuple(stage.name for stage in self._castream.stages)

    @property
    def pooled_stage(self) -> Stage:
        """The stage of the tensor that is pooled."""
        return self._castream.stages[-1]

    @property
    def backbone_cfg(self) -> Any:
        """timm's pretrained cfg of the model without its stream."""
        return self._castream.restore.get('pretrained_cfg') or self.pretrained_cfg

    def use_variant_cfg(self, cfg: dict[str, Any]) -> None:
        """Gives the model the pretrained cfg of its `_castream` variant. `detach` gives it the backbone's own back."""
        self._castream.restore = {'pretrained_cfg': self.pretrained_cfg, 'default_cfg': self.pretrained_cfg}
        self.pretrained_cfg = self.default_cfg = cfg

    # timm's model contract

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._castream.uses_stream:
            return run_with(None, super().forward_features, x, *args, **kwargs)
        return self._run_stream(super().forward_features, x, *args, **kwargs)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._castream.uses_stream:
            return run_with(None, super().forward_intermediates, x, *args, **kwargs)
        return self._run_stream(super().forward_intermediates, x, *args, **kwargs)

    def forward_head(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._castream.uses_stream:
            return super().forward_head(x, *args, **kwargs)
        return self.forward_ca_head(x, query_of(x), *args, **kwargs)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, *args: Any, **kwargs: Any) -> None:
        if self.castream.class_specific:
            check_class_specific(num_classes, global_pool)
        super().reset_classifier(num_classes, global_pool, *args, **kwargs)
        pooling = head_pooling(self, self.pooled_stage, super().forward_head)
        self._castream.head_pools = pooling is not HeadPooling.NONE
        if self.castream.class_specific:
            self.castream.reset_cls_token(num_classes)

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        kept = super().prune_intermediate_layers(*args, **kwargs)
        if not self._castream.head_pools:  # there is no pooling left that a stream could replace
            remove_stream(self)
        return kept

    # torch's module contract

    def train(self, mode: bool = True) -> CAStreamMixin:
        super().train(mode)
        if self._castream.frozen:
            freeze_norms(self)
        return self

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As torch's, and strict loading takes the state dict of the plain backbone: the stream then stays as it is."""
        if strict and not any(key.startswith(KEY_PREFIX) for key in state_dict):
            warnings.warn(
                f'The state dict has no {KEY_PREFIX}* keys: the backbone takes its weights, the stream stays as it is.',
                stacklevel=2,
            )
            own = super().state_dict()
            state_dict = {**state_dict, **{k: v for k, v in own.items() if k.startswith(KEY_PREFIX)}}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class is made at run time, so copies and pickles make it anew
        return _rebuild, (_backbone_class(self),), self.__dict__.copy()

    def __prepare_scriptable__(self) -> None:  # torch.jit.script calls it
        raise RuntimeError(
            'TorchScript cannot script a CA-Stream: it does not see forward hooks. Use torch.compile, torch.export or '
            'torch.jit.trace.'
        )

    # both poolings

    def stream_features(self, x: Tensor, attention: list[Tensor] | None = None) -> Tensor:
        """`forward_features` with the stream, under either pooling.

        Args:
            x: (B, 3, H, W).
            attention: A list that receives the attention of each stage but the last, (B, heads, H_l, W_l).

        Returns:
            The tensor that is pooled, in the layout of `pooled_stage`; `query_of` takes q_L from it.
        """
        return self._run_stream(super().forward_features, x, attention=attention)

    def gap_features(self, x: Tensor) -> Tensor:
        """`forward_features` without the stream, under either pooling: the tensor that is pooled."""
        return run_with(None, super().forward_features, x)

    def forward_gap_head(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The backbone's own head, under either pooling: (B, C) logits."""
        return super().forward_head(features, *args, **kwargs)

    def forward_ca_head(self, features: Tensor, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The last block and the backbone's own head, under either pooling.

        Args:
            features: The tensor that is pooled, in the layout of `pooled_stage`.
            query: q_L, (B, D_L).

        Returns:
            (B, C) logits.
        """
        pooled = self.castream.step(-1, query, self.pooled_stage.to_nchw(features))
        return super().forward_head(self.pooled_stage.one_location(pooled), *args, **kwargs)

    def _run_stream(
        self, forward: Callable[..., Any], x: Tensor, *args: Any, attention: list[Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """Calls `forward` with a stream pass open and leaves q_L on the feature map that it returns."""
        if isinstance(x, torch.fx.Proxy):
            raise RuntimeError(
                'FX symbolic tracing cannot follow a CA-Stream: it does not see forward hooks. Use torch.export.'
            )
        query = self._initial_query(x)
        stream_pass = StreamPass(self.castream, None if self._is_checkpointed() else query, x.shape[-2:], attention)
        output = run_with(stream_pass, forward, x, *args, **kwargs)
        features: Any = output[0] if isinstance(output, tuple) else output
        if not isinstance(features, Tensor):  # forward_intermediates(intermediates_only=True): no map for a head
            return output
        hooked, ran = len(self.castream.blocks) - 1, stream_pass.visited + len(stream_pass.waiting)
        if ran != hooked and isinstance(output, Tensor):
            raise RuntimeError(
                f'{ran} stages ran and {hooked} are hooked: a module among {", ".join(self.castream_stages[:-1])} was '
                'replaced after attach(). Call detach() and attach() again.'
            )
        partial = ran != hooked  # forward_intermediates(stop_early=True)
        if query is None and not partial:
            # Where no stage is hooked none can be missing: compare the channels.
            partial = self.pooled_stage.to_nchw(features).shape[1] != self.castream.dims[-1]
        if partial:
            return output
        if stream_pass.query is None:
            stream_pass.start(
                self.castream.initial_query(x.shape[0], self._predict(features)) if query is None else query
            )
        features._castream_query = stream_pass.query  # type: ignore[attr-defined]
        return output

    def _initial_query(self, x: Tensor) -> Tensor | None:
        """q_0 of the batch, (B, D_0), or None where GAP has to predict first."""
        if not self.castream.class_specific:
            return self.castream.initial_query(x.shape[0])
        labels = self._castream.labels
        if labels is None:
            if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                warnings.warn(
                    'A class specific stream trains without labels and takes those that GAP predicts; put the forward '
                    'inside timm_castream.class_labels(model, target).',
                    stacklevel=4,
                )
            return None
        if labels.shape[0] != x.shape[0]:
            raise ValueError(
                f'class_labels holds {labels.shape[0]} labels and the model got {x.shape[0]} images (DataParallel '
                'splits a batch: use DistributedDataParallel).'
            )
        return self.castream.initial_query(x.shape[0], labels)

    def _predict(self, features: Tensor) -> Tensor:
        """(B,) classes that the GAP network predicts."""
        return super().forward_head(features.detach()).detach().argmax(1)

    def _is_checkpointed(self) -> bool:
        """Whether stages may run inside a checkpointed region, which records no graph or records it again in backward.

        The stream then runs after them; checkpointing keeps the stages' outputs anyway.
        """
        parts: list[Any] = [self, getattr(self, 'encoder', None)]  # qwen3_vit and others checkpoint in an encoder
        return torch.is_grad_enabled() and any(getattr(part, 'grad_checkpointing', False) for part in parts)


def add_stream(model: nn.Module, stream: CAStream, attachment: Attachment) -> None:
    """Puts a stream into a model that has none: class, hooks and attributes. In place."""
    for stage in attachment.stages[:-1]:
        hook_target(model.get_submodule(stage.name)).register_forward_hook(StageHook(stage))
    backbone: Any = model  # torch types the attributes of a module as tensors or modules
    backbone._castream = attachment
    backbone.castream = stream
    backbone.__class__ = castream_class(backbone.__class__)


def remove_stream(model: CAStreamMixin) -> None:
    """Undoes `add_stream`: class, hooks, `requires_grad` flags and cfg are those of the model before. In place."""
    state = model._castream
    for stage in state.stages[:-1]:
        try:
            hooks = hook_target(model.get_submodule(stage.name))._forward_hooks
        except AttributeError:  # the stage was pruned away
            continue
        for key in [key for key, hook in hooks.items() if isinstance(hook, StageHook)]:
            del hooks[key]
    if state.frozen:
        unfreeze(model, state.frozen_names)
    for name, value in state.restore.items():
        setattr(model, name, value)
    backbone: Any = model
    if hasattr(backbone, '_model_args'):  # timm saves them as the arguments of the backbone
        ours = {*state.config.to_dict(), 'freeze_backbone', 'backbone_pretrained', 'backbone_checkpoint'}
        backbone._model_args = {key: value for key, value in backbone._model_args.items() if key not in ours}
    backbone.__class__ = _backbone_class(backbone)
    del backbone.castream, backbone._castream


def castream_model(model: nn.Module) -> CAStreamMixin:
    """The model with a stream, itself or inside a wrapper (DistributedDataParallel, torch.compile's).

    Raises:
        ValueError: If there is none.
    """
    for module in model.modules():
        if isinstance(module, CAStreamMixin):
            return module
    architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    by_name = f', or open {architecture}_castream in place of {architecture}' if architecture else ''
    raise ValueError(f'This {type(model).__name__} has no CA-Stream; call timm_castream.attach(model) first{by_name}.')


def outermost_streams(model: nn.Module) -> list[CAStreamMixin]:
    """The models with a stream in a module, without those inside another one (a teacher in its student)."""
    if isinstance(model, CAStreamMixin):
        return [model]
    found = [stream for child in model.children() for stream in outermost_streams(child)]
    return list(dict.fromkeys(found))


def query_of(features: Tensor) -> Tensor:
    """q_L, (B, D_L), which `forward_features` left on the tensor that it returned.

    Raises:
        RuntimeError: If this tensor carries none.
    """
    query = getattr(features, '_castream_query', None)
    if query is None:
        raise RuntimeError(
            'This feature map carries no query of a CA-Stream: pass forward_head the very tensor that forward_features '
            "returned under pooling 'ca', not a copy, or call model(x)."
        )
    return query


def carry_query(features: Tensor, changed: Tensor) -> Tensor:
    """Leaves the query of a feature map, where it has one, on the map that takes its place."""
    query = getattr(features, '_castream_query', None)
    if query is not None:
        changed._castream_query = query  # type: ignore[attr-defined]
    return changed


def check_class_specific(num_classes: int, global_pool: str | None) -> None:
    if num_classes < 1 or global_pool == '':
        raise ValueError(
            'A class specific stream needs a classifier: num_classes must be at least 1 and global_pool not empty, got '
            f'num_classes={num_classes} and global_pool={global_pool!r}.'
        )


@functools.cache
def castream_class(base: Any) -> Any:
    return type(base.__name__, (CAStreamMixin, base), {'__module__': base.__module__, '__doc__': base.__doc__})


def _backbone_class(model: nn.Module) -> type[nn.Module]:
    mro = type(model).__mro__
    return mro[mro.index(CAStreamMixin) + 1]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = castream_class(base)  # type: ignore[arg-type]
    return cls.__new__(cls)
