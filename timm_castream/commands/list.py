"""`castream list`: the models with a stream."""

from __future__ import annotations

import argparse
from typing import Any

EXAMPLE = "castream list 'resnet*' --parameters"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('filter', nargs='?', default='*', help='as for timm.list_models (default: all)')
    parser.add_argument('--parameters', action='store_true', help='add the parameters and the stages of the stream')


def run(args: argparse.Namespace) -> int:
    import timm
    import torch

    from ..backbones.architectures import unknown_name_message

    names = [name for name in timm.list_models([args.filter, f'{args.filter}_castream']) if name.endswith('_castream')]
    if not names:
        raise ValueError(unknown_name_message(args.filter))
    if not args.parameters:
        print('\n'.join(names))
        return 0
    width = max(map(len, names))
    print(f'{"model":{width}}  {"stream":>12}  {"total":>13}  stages')
    for name in names:  # a row appears as soon as it is known
        with torch.device('meta'):  # parameters are counted, not made
            model: Any = timm.create_model(name)
        stream, total = (sum(p.numel() for p in part.parameters()) for part in (model.castream, model))
        print(f'{name:{width}}  {stream:>12,}  {total:>13,}  {" ".join(model.castream_stages)}', flush=True)
    return 0
