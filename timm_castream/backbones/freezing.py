"""Freezes a network around its stream: parameters without gradients, normalisation layers in eval mode."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer. SyncBatchNorm may take BatchNorm's place later: ask when needed."""
    return isinstance(module, _NORMS) or hasattr(module, 'running_var')


def norm_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The normalisation layers of a model."""
    return (module for module in model.modules() if is_norm(module))


def freeze(model: nn.Module, trained_prefix: str) -> tuple[str, ...]:
    """Takes the gradients of all parameters but those under a prefix, and sets normalisation layers to eval mode.

    Returns:
        Names of the parameters that had gradients before, for `unfreeze`.
    """
    names = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith(trained_prefix):
            parameter.requires_grad_(False)
            names.append(name)
    freeze_norms(model)
    return tuple(names)


def freeze_norms(model: nn.Module) -> None:
    """Sets normalisation layers to eval mode: their statistics stay."""
    for module in norm_layers(model):
        module.training = False


def unfreeze(model: nn.Module, names: tuple[str, ...]) -> None:
    """Undoes `freeze`."""
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(True)
    for module in norm_layers(model):
        module.training = model.training
