"""Options that several commands share."""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .._utils.keywords import ParseKwargs
from .._utils.near import did_you_mean
from .names import names, rows

if TYPE_CHECKING:
    from torch import nn

    from ..attribution.user_methods import UserMethod

_logger = logging.getLogger(__name__)

_IMAGENET = 1000  # classes
_SMALL = 64  # the last map of larger images has several locations

# What torch.device takes.
_DEVICE = re.compile(r'(cpu|cuda|mps|xpu|mtia|hpu|npu|mlu|xla|meta|privateuseone)(:\d+)?')


def add_model_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The options that name a model, for `open_from`."""
    group = parser.add_argument_group('model')
    group.add_argument('--model', required=required, help='name of a model, hf-hub:ORG/NAME or local-dir:DIR')
    group.add_argument('--pretrained', action='store_true', help="with the model's published weights")
    group.add_argument(
        '--checkpoint',
        metavar='FILE_OR_HUB_ID',
        help="weights: of timm's train.py, safetensors, or ORG/NAME on the Hub",
    )
    group.add_argument('--use-ema', action='store_true', help='the averaged weights of the checkpoint')
    add_class_names(group)
    group.add_argument('--num-classes', type=count_or_none, help="other than the model's own")
    add_model_kwargs(group)
    group.add_argument(
        '--device', type=_device, metavar='NAME', help='cpu, cuda, cuda:1, ... (default: cuda if there is one)'
    )


def add_class_names(parser: argparse._ActionsContainer) -> None:
    """`--class-names`, for `name_classes`."""
    parser.add_argument(
        '--class-names',
        metavar='FILE',
        help='names of the classes of the weights, one a line in the order of their indices; imagenet: those of ImageNet',
    )


def name_classes(model: Any, args: argparse.Namespace) -> None:
    """Gives the model the names of `--class-names`, or says how to where its weights name none."""
    from ..hub.label_names import give_names, label_names

    if args.class_names:
        give_names(model, args.class_names)
    elif (args.checkpoint or args.pretrained) and model.num_classes and label_names(model) is None:
        _logger.info(
            'The weights name none of their %s: --class-names FILE gives names, one a line in the order of the '
            'indices%s.',
            'two classes' if model.num_classes == 1 else f'{model.num_classes} classes',
            ', and --class-names imagenet those of ImageNet' if model.num_classes == _IMAGENET else '',
        )


def add_size_options(parser: argparse._ActionsContainer) -> None:
    """The options of the eval transform."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument('--img-size', type=count, metavar='N', help="side of the input in pixels (default: the model's)")
    size.add_argument(
        '--input-size',
        type=count,
        nargs=3,
        metavar=('C', 'H', 'W'),
        help="channels, height and width of the input, as timm's scripts take them",
    )
    parser.add_argument(
        '--crop-mode',
        choices=('center', 'squash', 'border'),
        help="cut what lies beside a square, squeeze it in, or pad it (default: the model's)",
    )
    parser.add_argument(
        '--crop-pct', type=_share, metavar='X', help="share of the image in the crop (default: the model's)"
    )


def add_normalisation_options(parser: argparse._ActionsContainer) -> None:
    """`--mean` and `--std`, as timm's scripts have them."""
    for name in ('mean', 'std'):
        parser.add_argument(
            f'--{name}',
            type=_of_pixels,
            nargs='+',
            metavar='X',
            help="of pixels in [0, 1], one number or one per channel, for weights trained with others than the model's",
        )


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f'{text!r} is no device, valid ones are cpu, cuda, cuda:1, ...')
    return text


def device_of(args: argparse.Namespace) -> str:
    """The device of `--device`, or the one that there is."""
    import torch

    return args.device or ('cuda' if torch.cuda.is_available() else 'cpu')


def one_of(kind: str, valid: Sequence[str]) -> Callable[[str], str]:
    """A type of an option: a name, whose mistyped form gets the nearest valid one in the error."""

    def check(text: str) -> str:
        if text not in valid:
            hint = did_you_mean(text, valid)
            raise argparse.ArgumentTypeError(f'{kind} {text!r} is unknown{hint}, valid ones: {", ".join(valid)}')
        return text

    return check


def count(text: str, least: int = 1) -> int:
    """The type of an option that counts something."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f'{text!r} is out of range, valid ones are whole numbers from {least}')
    return value


def count_or_none(text: str) -> int:
    """The type of an option that may be 0."""
    return count(text, 0)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is no number') from None


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f'{value:g} is no share, valid ones lie above 0 and up to 1')
    return value


def _of_pixels(text: str) -> float:
    value = _number(text)
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f'{value:g} is out of range: pixels lie in [0, 1], so divide by 255')
    return value


def add_model_kwargs(parser: argparse._ActionsContainer) -> None:
    """`--model-kwargs`, as timm's scripts have it."""
    parser.add_argument(
        '--model-kwargs',
        nargs='*',
        default={},
        action=ParseKwargs,
        metavar='KEY=VALUE',
        help='arguments of create_model, such as stream_start=2',
    )


def open_from(args: argparse.Namespace) -> nn.Module:
    """The model that the options of `add_model_options` name."""
    from ..hub.load import open_model

    model = open_model(
        args.model,
        args.checkpoint,
        args.pretrained,
        args.use_ema,
        **{'num_classes': args.num_classes, **args.model_kwargs},
    )
    name_classes(model, args)
    set_images(model, args)
    return model


def set_images(model: Any, args: argparse.Namespace) -> None:
    """Gives the model the images of `add_size_options` and `add_normalisation_options`."""
    from ..backbones.image_settings import set_image_settings
    from ..backbones.stages import has_one_location

    set_image_settings(model, args.input_size, args.img_size, args.crop_pct, args.crop_mode, args.mean, args.std)
    size = tuple(model.pretrained_cfg['input_size'])
    if max(size[1:]) <= _SMALL and (args.img_size or args.input_size) and has_one_location(model, size):
        _logger.warning(
            'At %d x %d pixels the last feature map has one location, so its saliency maps are constant and say nothing: '
            'choose a larger %s.',
            *size[1:],
            '--img-size' if args.img_size else '--input-size',
        )


def add_method_options(parser: argparse.ArgumentParser, methods: Sequence[str]) -> None:
    """The options of saliency, for `methods_from`.

    Args:
        parser: The parser of the command.
        methods: The methods by default.
    """
    group = parser.add_argument_group('saliency')
    group.add_argument(
        '--methods',
        nargs='+',
        metavar='METHOD',
        help=f'all, or of {", ".join(rows("attribution/methods", "Method"))}, captum:NAME, grad-cam:NAME, torchcam:NAME with ,key=value arguments of the library, or '
        f'LABEL=NAME or LABEL=package.module:function, which gets (x, target), and the network in a parameter of the '
        f'name model (default: {" ".join(methods)}; without '
        'attention for a model without a stream)',
    )
    parser.set_defaults(default_methods=tuple(methods))
    group.add_argument(
        '--maps',
        nargs='+',
        default=[],
        metavar='LABEL=FILE',
        help='saved maps: .npz or a folder of .npy, a map for each image by its name, or one .npy array (N, h, w) in '
        'the order of castream list-images',
    )
    group.add_argument(
        '--poolings',
        nargs='+',
        choices=names('attach', 'POOLINGS'),
        help='(default: both, or gap for a model without a stream)',
    )
    group.add_argument('--layer', help='another module than the pooled stage for the CAM methods')


def methods_from(args: argparse.Namespace, model: nn.Module, images: Sequence[str]) -> dict[str, UserMethod]:
    """The methods of `--methods` and `--maps`.

    A function gets (x, target) as in `evaluate.evaluate`, and the model too if it has a parameter of the name `model`,
    in the place of that parameter.

    Args:
        args: The options.
        model: The network.
        images: Names of all images in their order, with which the names of saved maps are compared.

    Raises:
        ValueError: If a label is repeated, or a function or a file is not there.
    """
    from ..attribution.methods import METHODS
    from ..attribution.peers import is_peer, peer_names
    from ..attribution.saved_maps import read_maps
    from ..inference.predictor import has_stream

    words = args.methods
    if words is None:
        with_stream = has_stream(model)
        words = (
            ()
            if args.maps
            else [name for name in args.default_methods if with_stream or 'stream' not in METHODS[name].needs]
        )
    if 'all' in words:
        at = list(words).index('all')
        words = [*words[:at], *_every_method(args, model), *words[at + 1 :]]
    methods: dict[str, UserMethod] = {}
    for word in (*words, *args.maps):
        label, equals, source = (word, '', word) if is_peer(word) else word.partition('=')
        if label in methods:
            raise ValueError(f'method {label!r} is given twice.')
        if word in args.maps:
            if not source:
                raise ValueError(f'--maps takes LABEL=FILE, got {word!r}.')
            methods[label] = read_maps(source, images)
        elif source in METHODS or is_peer(source):
            methods[label] = source
        elif ':' in word and not equals and not did_you_mean(word, (*METHODS, *peer_names())):
            name = word.rpartition(':')[2].rpartition('.')[2] or 'LABEL'
            raise ValueError(
                f'--methods takes a function as LABEL=package.module:function, got {word!r}: write {name}={word}.'
            )
        elif equals:
            methods[label] = _import_function(word, source, model)
        else:
            methods[label] = label
    return methods


def _every_method(args: argparse.Namespace, model: nn.Module) -> list[str]:
    """Names of the built-in methods and of those of the installed libraries that run on a model."""
    import torch

    from ..attribution.methods import METHODS
    from ..attribution.peers import peers_that_work
    from ..backbones.image_settings import image_settings
    from ..inference.predictor import Predictor

    predictor = Predictor(model, layer=args.layer)
    noise = torch.randn(1, *image_settings(model)['input_size'], generator=torch.Generator().manual_seed(0))
    own = [name for name, row in METHODS.items() if predictor.has_stream or 'stream' not in row.needs]
    return [*own, *peers_that_work(predictor, noise.to(predictor.device))]


def _import_function(word: str, source: str, model: nn.Module) -> Callable[..., Any]:
    module_name, colon, name = source.partition(':')
    if not (module_name and colon and name):
        from ..attribution.methods import METHODS
        from ..attribution.peers import peer_names

        hint = did_you_mean(source, (*METHODS, *peer_names()))
        raise ValueError(f'--methods takes a name or LABEL=package.module:function, got {word!r}{hint}.')
    if '' not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # an installed command does not search the current folder
    try:
        function = functools.reduce(getattr, name.split('.'), importlib.import_module(module_name))
    except (AttributeError, ImportError) as error:
        raise ValueError(f'{source} of --methods cannot be imported: {error}') from error
    if not callable(function):
        raise ValueError(f'{source} of --methods is no function.')
    parameters = inspect.signature(function).parameters
    if 'model' not in parameters:
        return function
    place = list(parameters).index('model')
    if place > 1 or parameters['model'].kind is inspect.Parameter.KEYWORD_ONLY:
        return functools.update_wrapper(functools.partial(function, model=model), function)

    def with_model(x: Any, target: Any) -> Any:
        arguments = [x, target]
        arguments.insert(place, model)
        return function(*arguments)

    return functools.update_wrapper(with_model, function)


def add_engine(parser: argparse._ActionsContainer) -> None:
    """`--engine` of the forwards of masked images."""
    engines = names('inference/engine', 'ENGINES')
    parser.add_argument(
        '--engine',
        type=one_of('engine', engines),
        default=engines[0],
        metavar='NAME',
        help=f'what runs the forwards of masked images: {", ".join(engines)}; auto takes ONNX Runtime where it is faster '
        '(default: %(default)s)',
    )


def add_format(parser: argparse.ArgumentParser) -> None:
    """`--format` of the table that is printed."""
    parser.add_argument(
        '--format',
        choices=names('evaluation/tables', 'FORMATS'),
        default='text',
        help='of the table that is printed; latex needs the package booktabs (default: %(default)s)',
    )
