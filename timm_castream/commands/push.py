"""`castream push`: a trained model on the Hugging Face Hub."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .options import add_class_names, add_model_kwargs, name_classes

PHRASES = {
    'name a tag with backbone_pretrained, or pass False': 'name a tag with --backbone-tag, or add --own-backbone',
    'name another tag with backbone_pretrained, or pass False': (
        'name another tag with --backbone-tag, or add --own-backbone'
    ),
}
EXAMPLE = 'castream push model_best.pth.tar --model resnet50_castream --repo me/resnet50_castream.sgd90_in1k'


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'checkpoint', metavar='CHECKPOINT', nargs='?', help="as timm's train.py writes it, or safetensors"
    )
    parser.add_argument('--pretrained', action='store_true', help='in place of CHECKPOINT: the weights of the name')
    parser.add_argument('--model', required=True, help='name of the model')
    add_model_kwargs(parser)
    add_class_names(parser)
    parser.add_argument('--repo', required=True, metavar='ORG/NAME')
    parser.add_argument('--use-ema', action='store_true', help='the averaged weights of the checkpoint')
    parser.add_argument('--stream-only', action='store_true', help='leave the backbone out: it comes from timm')
    parser.add_argument('--backbone-tag', help="timm's weights on which the stream was trained (default: the model's)")
    parser.add_argument(
        '--own-backbone', action='store_true', help="with --stream-only: it was trained on weights that are not timm's"
    )
    parser.add_argument('--metrics', metavar='FILE', help='evaluation.json of castream evaluate, for the model card')
    parser.add_argument('--dataset', help='name of the training data on the Hub')
    parser.add_argument('--private', action='store_true', help='make the repository private')
    parser.add_argument('--dry-run', metavar='DIR', help='write the folder and upload nothing')


def run(args: argparse.Namespace) -> int:
    from ..hub import push_to_hub
    from ..hub.load import open_model
    from ..hub.repository import write_repository

    if bool(args.checkpoint) == args.pretrained:
        raise ValueError('Name either a CHECKPOINT or --pretrained.')
    if args.checkpoint and not Path(args.checkpoint).is_file():
        raise FileNotFoundError(f'There is no file {args.checkpoint}.')
    model = open_model(args.model, args.checkpoint, args.pretrained, args.use_ema, **args.model_kwargs)
    name_classes(model, args)
    card = {
        'metrics': _read_json(args.metrics) if args.metrics else None,
        'dataset': args.dataset,
        'backbone_pretrained': not args.own_backbone and (args.backbone_tag or True),
    }
    if args.dry_run:
        print(write_repository(model, args.dry_run, args.repo, args.stream_only, **card))
    else:
        print(push_to_hub(model, args.repo, args.stream_only, private=args.private, **card))
    return 0


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except ValueError:
        raise ValueError(f'{path} is no JSON, which castream evaluate writes as evaluation.json.') from None
