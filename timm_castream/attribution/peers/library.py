"""What the adapters of libraries have in common: the rows of their methods, and arguments by name.

Letters: B images, C channels of the images, K classes, D channels and h x w locations of the layer, H x W pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from ...inference.predictor import Predictor
from .hookable import HookableNetwork


@dataclass(frozen=True)
class PeerMethod:
    """A method of a library.

    Attributes:
        name: Its class in the library.
        layer: Whether it reads the feature maps of a layer.
        alone: Whether it gets one image at a time: its maps depend on the batch, or its memory grows with it.
        random: Whether it draws random numbers. It then gets one image at a time too, with a seed of its own.
        forward_a_channel: Whether it takes forwards for each channel of the layer.
        forwards: Forwards of one map, or of each channel, roughly; a backward counts as two.
        costly: Why `all` leaves it out, or ''.
        refused: Why it cannot run here, or ''.
        unfit: Function from a network to the reason why the method says nothing about it, or ''.
        defaults: Function from (C, H, W) to arguments for which the library has no value.
    """

    name: str
    layer: bool = True
    alone: bool = False
    random: bool = False
    forward_a_channel: bool = False
    forwards: int = 4
    costly: str = ''
    refused: str = ''
    unfit: Callable[[Predictor], str] = field(default=lambda predictor: '', repr=False)
    defaults: Callable[[Sequence[int]], dict[str, Any]] = field(default=lambda shape: {}, repr=False)


class Library:
    """A library of methods, over its public interface.

    Attributes:
        prefix: What names its methods, as in `captum:Saliency`.
        module: Module that has the classes of the methods.
        package: Package to install.
        methods: Rows by name.
    """

    prefix: str
    module: str
    package: str
    methods: Mapping[str, PeerMethod]
    given: frozenset[str]  # arguments of the library that the adapter gives

    def functions(self, row: PeerMethod, arguments: Mapping[str, Any]) -> tuple[Callable[..., Any], ...]:
        """The functions of the library that take the arguments of a method."""
        raise NotImplementedError

    def maps(
        self,
        network: HookableNetwork,
        x: Tensor,
        classes: list[int],
        row: PeerMethod,
        arguments: Mapping[str, Any],
        batch_size: int,
    ) -> Any:
        """Maps of the library.

        Args:
            network: The network, with a layer where the method reads one.
            x: (B, C, H, W) images without gradients.
            classes: B class indices.
            row: The method.
            arguments: Arguments of the library by name.
            batch_size: Images of one forward where the library has a setting that bounds them.

        Returns:
            (B, h, w) or (B, D, h, w), a tensor or an array.
        """
        raise NotImplementedError

    @property
    def installed(self) -> bool:
        """Whether the library is there. It is not imported."""
        return find_spec(self.module.partition('.')[0]) is not None

    @property
    def version(self) -> str:
        """Version of the installed library."""
        return version(self.package)

    def method_class(self, name: str) -> Any:
        """The class of a method.

        Raises:
            ValueError: If the library is not installed, cannot be imported, or is older than the method.
        """
        try:
            return getattr(import_module(self.module), name)
        except ImportError as error:
            problem = f', which cannot be imported ({error})' if self.installed else ''
            raise ValueError(
                f'{self.prefix}:{name} needs {self.package}{problem}: pip install {self.package}'
            ) from None
        except AttributeError:
            raise ValueError(
                f'{self.prefix}:{name} needs a newer {self.package} than {self.version}: '
                f'pip install --upgrade {self.package}'
            ) from None

    def split(self, row: PeerMethod, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The arguments that go to each of `functions`; `base_method` becomes the class of that name."""
        base = {name: self.method_class(value) for name, value in arguments.items() if name == 'base_method'}
        return split({**arguments, **base}, self.functions(row, arguments))

    def check(self, row: PeerMethod, arguments: Mapping[str, Any]) -> None:
        """Raises ValueError if the library is missing, or the method takes no argument of a name or no such value."""
        self.method_class(row.name)
        valid = {k: v for k, v in parameters(self.functions(row, arguments)).items() if k not in self.given}
        for name, value in arguments.items():
            if name not in valid:
                raise ValueError(f'{self.prefix}:{row.name} has no argument {name!r}, valid ones: {", ".join(valid)}.')
            if kind := _kind(valid[name].default, value):
                raise ValueError(f'{self.prefix}:{row.name} takes {kind} for {name}, got {value!r}.')


def zero_before_norm(predictor: Predictor) -> str:
    """Why a method says nothing where tokens are normalised behind the layer, or ''.

    The scores change neither with the length of a token nor with a constant added to it. So a token times its gradient,
    and the gradient alone, sum to zero over the channels, up to rounding.
    """
    if predictor.norm_layer is None:
        return ''
    return (
        f'tokens are normalised behind {predictor.cam_layer}, so its values sum to zero over the channels, and the maps '
        f'would be rounding noise: name the normalisation with layer={predictor.norm_layer}'
    )


def without_other_classes(predictor: Predictor) -> str:
    """Why a method that compares a class with others does not fit a network, or ''."""
    return '' if predictor.score is None else 'it compares the class with others, and target is a function'


def _kind(default: Any, value: Any) -> str:
    """What a parameter with this default takes where the value is of another kind, or ''.

    Without this check `abs=false` would be text, which counts as true.
    """
    if isinstance(default, bool):
        return '' if isinstance(value, bool) else 'True or False'
    if isinstance(default, (int, float)):
        return 'a number' if isinstance(value, (bool, str)) else ''
    return 'text' if isinstance(default, str) and not isinstance(value, str) else ''


def parameters(functions: Iterable[Callable[..., Any]]) -> dict[str, inspect.Parameter]:
    """The parameters of functions by name, each as the first one has it."""
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found: dict[str, inspect.Parameter] = {}
    for function in functions:
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind not in open_ended and name != 'self':
                found.setdefault(name, parameter)
    return found


def parameter_names(functions: Iterable[Callable[..., Any]]) -> list[str]:
    """Names of the parameters of functions, each once."""
    return list(parameters(functions))


def split(arguments: Mapping[str, Any], functions: Sequence[Callable[..., Any]]) -> list[dict[str, Any]]:
    """The arguments that go to each function: to the first one that has a parameter of the name."""
    parts: list[dict[str, Any]] = [{} for _ in functions]
    names = [parameter_names([function]) for function in functions]
    for name, value in arguments.items():
        parts[next(i for i, own in enumerate(names) if name in own)][name] = value
    return parts
