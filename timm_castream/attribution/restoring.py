"""Leaves a network as it was, whatever a method of the user or of another library does to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

# Module, attribute that holds its hooks, key and hook.
Hooks = list[tuple[nn.Module, str, int, Any]]


@contextmanager
def as_it_was(model: nn.Module, hooks: Hooks | None = None, values: bool = True) -> Iterator[None]:
    """Gives a network back its modes, hooks, attributes, submodules, gradients and the values of its tensors.

    Checkpointing is off inside: it runs the hooks of a module twice.

    Args:
        model: The network.
        hooks: Hooks that are put on the network inside. Afterwards, those that were left on it. None: none.
        values: Whether weights and buffers may change inside.
    """
    modules: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (module, dict(vars(module)), _tables(module)) for module in model.modules()
    ]
    parameters = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    tensors = [t for t in chain(model.parameters(), model.buffers()) if values and not t.is_inference()]
    copies = [tensor.detach().clone() for tensor in tensors]
    for parameter, _, _ in parameters:
        parameter.grad = None
    for module, _, _ in modules:
        if getattr(module, 'grad_checkpointing', False):
            module.grad_checkpointing = False
    for module, table, key, hook in hooks or ():
        vars(module)[table].setdefault(key, hook)
    try:
        yield
    finally:
        if hooks is not None:
            hooks[:] = _left(modules)
        for module, attributes, tables in modules:
            own = vars(module)
            for name in [name for name in own if name not in attributes]:
                del own[name]
            own.update(attributes)
            for name, items in tables.items():
                table = attributes[name]
                table.clear()
                table.update(items)
        _put_back(tensors, copies)
        for parameter, gradient, trains in parameters:
            parameter.grad = gradient
            parameter.requires_grad_(trains)


@torch.no_grad()
def _put_back(tensors: list[Tensor], copies: list[Tensor]) -> None:
    for tensor, copy in zip(tensors, copies, strict=True):
        if not torch.equal(tensor, copy):
            tensor.copy_(copy)


def _left(modules: list[tuple[Any, dict[str, Any], dict[str, Any]]]) -> Hooks:
    """The hooks that are on modules now and were not."""
    return [
        (module, name, key, hook)
        for module, attributes, tables in modules
        for name, items in tables.items()
        if name != '_modules'
        for key, hook in attributes[name].items()
        if key not in items
    ]


def _tables(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """Contents of the tables of hooks and submodules of a module, by the names of the attributes."""
    return {
        name: dict(value)
        for name, value in vars(module).items()
        if isinstance(value, dict) and (name == '_modules' or 'hooks' in name)
    }
