"""Models inside other modules: wrappers that change nothing, wrappers with a forward of their own, and their outputs.

Letters: N images, C classes, H x W pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

# Wrappers whose forward is that of the model inside, which is their attribute `module`.
_SAME_FORWARD = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel, ModelEmaV3)
_PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers whose forward is its own: DistributedDataParallel, torch.compile's, averaged weights."""
    while True:
        if isinstance(model, _SAME_FORWARD):
            model = model.module
        elif isinstance(compiled := getattr(model, '_orig_mod', None), nn.Module):
            model = compiled
        else:
            return model


def class_scores(output: Any, count: int, name: str) -> Tensor:
    """The class scores in the output of a model: (N, C) logits.

    Args:
        output: A tensor, an object with `logits`, a mapping with `'logits'`, or a tuple or list, whose first tensor of
            such a shape counts. Scores of shape (N, C, 1, 1) are flattened; (N,) is one logit an image.
        count: N.
        name: Name of the model, for errors.

    Raises:
        ValueError: If there are no such scores.
    """
    found = output
    if not isinstance(found, Tensor) and isinstance(getattr(found, 'logits', None), Tensor):
        found = found.logits
    if isinstance(found, Mapping) and 'logits' in found:
        found = found['logits']
    if isinstance(found, (tuple, list)):
        scores = [item for item in found if isinstance(item, Tensor) and _flat(item, count) is not None]
        found = scores[0] if scores else found
    if isinstance(found, Tensor):
        flat = _flat(found, count)
        if flat is not None:
            return flat
    raise ValueError(
        f'{name} gives {_text(output)} for {count} images and no class scores: they are a tensor (N, C), or one under '
        ".logits or ['logits'], or the first of a tuple."
    )


def _flat(tensor: Tensor, count: int) -> Tensor | None:
    """(N, C) of a tensor of class scores, or None."""
    if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        tensor = tensor.flatten(1)
    if tensor.ndim == 1:
        tensor = tensor[:, None]
    fits = tensor.ndim == 2 and len(tensor) == count and tensor.shape[1] and tensor.is_floating_point()
    return tensor if fits else None


def _text(output: Any) -> str:
    if isinstance(output, Tensor):
        return f'a tensor {tuple(output.shape)} of {output.dtype}'
    if isinstance(output, Mapping):
        return f'a {type(output).__name__} of {", ".join(map(str, list(output)[:5]))}'
    if isinstance(output, (tuple, list)):
        return f'a {type(output).__name__} of {", ".join(map(_text, output[:3]))}'
    return f'a {type(output).__name__}'


def in_precision_of(model: nn.Module, images: Tensor) -> Tensor:
    """Images in the floating point type of the model's weights: float32 images for a model in half precision."""
    weights = next((p for p in model.parameters() if p.dtype in _PRECISIONS), None)
    return images if weights is None or not images.is_floating_point() else images.to(weights.dtype)


def eager() -> AbstractContextManager[Any]:
    """Runs compiled networks uncompiled inside: torch.compile skips a hook that came after the first call."""
    # Without torch._dynamo, which takes seconds to import, nothing is compiled.
    return torch.compiler.set_stance('force_eager') if 'torch._dynamo' in sys.modules else nullcontext()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode afterwards. The gradient mode stays."""
    switched = [module for module in model.modules() if getattr(module, 'training', False)]  # frozen scripts have none
    for module in switched:
        module.training = False
    try:
        yield
    finally:
        for module in switched:
            module.training = True


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list that receives the images of each call of a module inside: the first tensor of its arguments."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with eager():
            yield seen
    finally:
        handle.remove()


def images_inside(wrapper: nn.Module, model: nn.Module, images: Tensor) -> Tensor:
    """The images that a wrapper gives to the model inside it.

    Args:
        wrapper: The wrapper.
        model: The model inside.
        images: (N, channels, H, W) images for the wrapper.

    Raises:
        ValueError: If the wrapper does not call the model once for all of the images.
    """
    with inputs_of(model) as seen:
        wrapper(images)
    return only_images(seen, len(images), wrapper, model)


def only_images(seen: list[Tensor], count: int, wrapper: nn.Module, model: nn.Module) -> Tensor:
    """The one batch of N images among the inputs of a model, or a ValueError."""
    if len(seen) != 1 or len(seen[0]) != count:
        calls = ', '.join(str(len(part)) for part in seen) or 'none'
        raise ValueError(
            f'{type(wrapper).__name__} must call the {type(model).__name__} inside it once with the images that it '
            f'gets: of {count} images it gets {calls}.'
        )
    return seen[0]
