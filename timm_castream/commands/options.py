"""Options that several commands share."""
from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

from ..attach import POOLINGS
from ..loading import open_model
from ..methods import METHODS
from ..timm_scripts.arguments import ParseKwargs


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that name a model, for `open_from`."""
    group = parser.add_argument_group('model')
    group.add_argument('--model', required=True, help='name of a model, hf-hub:ORG/NAME or local-dir:DIR')
    group.add_argument('--pretrained', action='store_true', help="with the model's published weights")
    group.add_argument('--checkpoint', metavar='FILE_OR_HUB_ID',
                       help="weights: of timm's train.py, safetensors, or ORG/NAME on the Hub")
    group.add_argument('--use-ema', action='store_true', help='the averaged weights of the checkpoint')
    group.add_argument('--num-classes', type=int, help="other than the model's own")
    add_model_kwargs(group)
    group.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                       help='(default: %(default)s)')


def add_model_kwargs(parser: argparse._ActionsContainer) -> None:
    """`--model-kwargs`, as timm's scripts have it."""
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
                        help='arguments of create_model, such as stream_start=2')


def open_from(args: argparse.Namespace) -> nn.Module:
    """The model that the options of `add_model_options` name."""
    return open_model(
        args.model, args.checkpoint, args.pretrained, args.use_ema,
        **{'num_classes': args.num_classes, **args.model_kwargs})


def add_method_options(parser: argparse.ArgumentParser, methods: Sequence[str]) -> None:
    """The options of saliency.

    Args:
        parser: The parser of the command.
        methods: The methods by default.
    """
    group = parser.add_argument_group('saliency')
    group.add_argument('--methods', nargs='+', default=list(methods), choices=METHODS, help='(default: %(default)s)')
    group.add_argument('--poolings', nargs='+', default=list(POOLINGS), choices=POOLINGS, help='(default: %(default)s)')
    group.add_argument('--layer', help='another module than the pooled stage for the CAM methods')
