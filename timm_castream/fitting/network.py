"""A frozen timm network as a fit needs it: the maps of its stages, its pooled vector and its head.

Letters: B images, C classes, D channels, H x W locations, L the last stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.probe import eval_mode, hook_target
from ..backbones.stages import find_stages
from ..inference.images import fast_memory_format


class FrozenNetwork:
    """A timm network without a stream whose weights stay as they are.

    Args:
        model: A timm model without a stream.
        stage_names: As `stream_stages` of `attach`. None: the default stages.

    Attributes:
        stages: All stages that a stream may visit, S_0 to S_L. The last one is the tensor that the model pools.
        pooled_by: How the head pools, a `backbones.stages.HeadPooling`.

    Raises:
        ValueError: If the model takes no stream.
    """

    def __init__(self, model: nn.Module, stage_names: Sequence[str] | None = None) -> None:
        self.model: Any = model
        self.stages, self.pooled_by = find_stages(model, stage_names)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Evaluation mode and no parameter with a gradient inside, everything as it was afterwards."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with eval_mode(self.model), torch.enable_grad():
            try:
                for parameter in trained:
                    parameter.requires_grad_(False)
                yield
            finally:
                for parameter in trained:
                    parameter.requires_grad_(True)

    def run(self, x: Tensor, start: int = 0) -> tuple[list[Tensor], Tensor]:
        """One forward without the head.

        Args:
            x: (B, channels, H, W) normalised images on the device of the model.
            start: The first stage whose map is wanted. `len(stages)` asks for none.

        Returns:
            The maps of the stages from `start` on, each (B, D_l, H_l, W_l) as the stream reads them, and the pooled
            vectors, (B, D_L): the head gives the logits of an image on a map of one location that holds its vector.
        """
        maps: list[Tensor] = []
        handles = []
        for stage in self.stages[start:-1]:

            def visit(module: nn.Module, args: Any, output: Any, stage: Any = stage) -> None:
                maps.append(stage.to_nchw(stage.tensor(output)))

            handles.append(hook_target(self.model.get_submodule(stage.name)).register_forward_hook(visit))
        try:
            with torch.no_grad():
                features = self.model.forward_features(x.contiguous(memory_format=fast_memory_format(x)))
        finally:
            for handle in handles:
                handle.remove()
        view = self.stages[-1].to_nchw(features)
        if start < len(self.stages):
            maps.append(view)
        return maps, self._pooled(features, view)

    def _pooled(self, features: Tensor, view: Tensor) -> Tensor:
        if self.pooled_by == 'token':
            return features[:, 0]
        if self.pooled_by == 'tokens':
            return features.mean(1)
        mean, peak = view.mean((2, 3)), view.amax((2, 3))
        return {'avg': mean, 'max': peak, 'avgmax': (mean + peak) / 2}[str(self.pooled_by)]

    def logits(self, vectors: Tensor) -> Tensor:
        """(B, C) logits of pooled vectors, or of the last queries of a stream, (B, D_L)."""
        return self.model.forward_head(self.stages[-1].one_location(vectors))
