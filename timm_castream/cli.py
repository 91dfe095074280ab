"""The command `castream`: list, train, validate, evaluate, explain, push and demo.

An error is one line that says what to do, with exit code 2; `--debug` shows the traceback. Heavy modules are imported
by the command that needs them.
"""
from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from timm.utils import ParseKwargs
from torch import nn

from .attach import POOLINGS
from .mixin import castream_model
from .version import __version__

SKIPPED = 1
USER_ERROR = 2
INTERRUPTED = 130  # what shells report after Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit code: 0; 1 where a part of the work was skipped; 2 for an error; 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (['train'], ['validate']):  # every option is handed on, --help and --debug too
        from train_wrappers.run import run_script

        return run_script(f'{argv[0]}.py', argv[1:])
    args = _make_parser().parse_args(argv)
    logging.basicConfig(format='%(message)s')
    logging.getLogger('timm_castream').setLevel(logging.INFO)  # not the HTTP client's requests
    try:
        return args.command(args)
    except KeyboardInterrupt:
        print('castream: interrupted', file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if args.debug:
            raise
        print(f'castream {args.name} needs {error.name}: pip install "timm_castream[demo]"', file=sys.stderr)
        return USER_ERROR
    except Exception as error:
        if args.debug:
            raise
        print(f'castream {args.name}: {" ".join(str(error).split()) or type(error).__name__}', file=sys.stderr)
        return USER_ERROR


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the commands do."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f'{self.prog}: {message} (see {self.prog} --help)\n')


def _list(args: argparse.Namespace) -> int:
    names = [name for name in timm.list_models(args.filter) if name.endswith('_castream')]
    if not names:
        raise ValueError(f'No variant matches {args.filter!r}; castream list shows them all.')
    rows = [('variant', 'stages', 'stream', 'total')]
    with torch.device('meta'):  # parameters are counted, not made
        for name in names:
            model: Any = timm.create_model(name)
            stream, total = (sum(p.numel() for p in part.parameters()) for part in (model.castream, model))
            rows.append((name, ' '.join(model.castream_stages), f'{stream:,}', f'{total:,}'))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, stages, stream, total in rows:
        print(f'{name:{widths[0]}}  {stages:{widths[1]}}  {stream:>{widths[2]}}  {total:>{widths[3]}}')
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from timm.data import create_loader, resolve_data_config
    from timm.utils.distributed import init_distributed_device_so

    from .datasets import create_dataset
    from .evaluate import evaluate

    place = init_distributed_device_so(device=args.device)
    device = torch.device(place['device'])
    model = _open_model(args).to(device).eval()
    config = resolve_data_config({'img_size': args.img_size, 'crop_pct': args.crop_pct}, model=model)
    dataset: Any = create_dataset(args.dataset, args.data_dir, split=args.split, class_map=args.class_map)
    loader = create_loader(
        dataset, config['input_size'], args.batch_size, interpolation=config['interpolation'], mean=config['mean'],
        std=config['std'], crop_pct=config['crop_pct'], crop_mode=config['crop_mode'], num_workers=args.workers,
        device=device, persistent_workers=False)
    # What changes nothing but speed may change when an interrupted evaluation goes on.
    shown = {
        'command', 'name', 'debug', 'output', 'device', 'workers', 'batch_size', 'mask_batch_size', 'torchcompile',
        'channels_last'}
    try:
        report = evaluate(
            model, loader, args.methods, args.poolings, args.target, setting=args.setting, layer=args.layer,
            num_samples=args.num_samples, seed=args.seed, batch_size=args.mask_batch_size,
            amp_dtype=getattr(torch, args.amp_dtype) if args.amp else None, channels_last=args.channels_last,
            torchcompile=args.torchcompile, output_dir=args.output,
            arguments={k: v for k, v in vars(args).items() if k not in shown}, progress=True)
    finally:
        if place['distributed']:
            torch.distributed.destroy_process_group()
    if place['global_rank'] == 0:
        print(f'\n{report}\n\nWritten to {args.output}: table.csv, evaluation.json, images.csv')
    return 0


def _explain(args: argparse.Namespace) -> int:
    from .visualize import explain, find_images

    paths = [*args.paths, *(find_images(args.images) if args.images else ())]
    if not paths:
        raise ValueError('Name images, or a folder of them with --images.')
    done = explain(
        _open_model(args).to(args.device).eval(), paths, args.methods, args.output, args.poolings, args.layer,
        identity=args.identity, activation='sigmoid' if args.multilabel else 'softmax')
    for path in [*done.pictures, *done.grids]:
        print(path)
    return SKIPPED if done.unreadable else 0


def _push(args: argparse.Namespace) -> int:
    from .hub import push_to_hub
    from .loading import open_model
    from .publish import write_repository

    if not os.path.isfile(args.checkpoint):
        raise FileNotFoundError(f'There is no file {args.checkpoint}.')
    model = open_model(args.model, args.checkpoint, use_ema=args.use_ema, **args.model_kwargs)
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
    import json

    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except ValueError:
        raise ValueError(f'{path} is no JSON, which castream evaluate writes as evaluation.json.') from None


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    report = demo.run(args.output, args.seed, demo.QUICK if args.quick else None)
    print(f'\n{report}\n\nWritten to {args.output}: report.md, figure.png, metrics.json, images.csv and the weights')
    return 0


def _open_model(args: argparse.Namespace) -> nn.Module:
    """The model of `--model`, `--checkpoint`, `--pretrained`, `--use-ema`, `--num-classes` and `--model-kwargs`."""
    from .loading import open_model

    model = open_model(
        args.model, args.checkpoint, args.pretrained, args.use_ema,
        **{'num_classes': args.num_classes, **args.model_kwargs})
    return castream_model(model)


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog='castream', description='CA-Stream attention pooling and saliency for timm models.',
        epilog='castream COMMAND --help shows the options of a command and an example.')
    parser.add_argument('--version', action='version', version=f'timm_castream {__version__}, timm {timm.__version__}')
    commands = parser.add_subparsers(metavar='COMMAND', required=True)

    command = _add_command(commands, _list, 'show the variants, their stages and parameters', "castream list 'resnet*'")
    command.add_argument('filter', nargs='?', default='*', help='as for timm.list_models (default: all)')

    for name in ('train', 'validate'):  # shown here, run before this parser is made
        commands.add_parser(name, help=f"timm's {name}.py with the plugin loaded", add_help=False)

    command = _add_command(
        commands, _evaluate, "the paper's interpretability protocol over a data set",
        'castream evaluate --model resnet50_castream --checkpoint last.pth.tar --data-dir /data/imagenet')
    _add_model_options(command)
    _add_method_options(command, ('grad_cam', 'grad_cam_pp', 'score_cam'))
    data = command.add_argument_group('data')
    data.add_argument('--data-dir', metavar='DIR', help='an image folder, or where the data set lies')
    data.add_argument('--dataset', default='',
                      help="cub200, voc2012, mit67, digits or a name of timm's (default: an image folder)")
    data.add_argument('--split', default='validation', help='(default: %(default)s)')
    data.add_argument('--class-map', default='', metavar='FILE', help="timm's class to index file")
    data.add_argument('--img-size', type=int, help="other than the model's own")
    data.add_argument('--crop-pct', type=float, help="other than the model's own")
    data.add_argument('--num-samples', type=int, metavar='N', help='evaluate a subset, drawn by --seed')
    data.add_argument('-b', '--batch-size', type=int, default=16, help='images at a time (default: %(default)s)')
    data.add_argument('-j', '--workers', type=int, default=2, help='processes that read images (default: %(default)s)')
    protocol = command.add_argument_group('protocol')
    protocol.add_argument('--target', choices=('truth', 'predicted'), default='truth',
                          help='the class explained (default: %(default)s)')
    protocol.add_argument('--setting', choices=('paper', 'rise'), default='paper',
                          help='of insertion and deletion (default: %(default)s)')
    protocol.add_argument('--seed', type=int, default=0, help='of the subset and the intervals (default: %(default)s)')
    speed = command.add_argument_group('speed')
    speed.add_argument('--mask-batch-size', type=int, metavar='N', help='masked images at a time (default: by device)')
    speed.add_argument('--amp', action='store_true', help='run the network under autocast')
    speed.add_argument('--amp-dtype', choices=('bfloat16', 'float16'), default='bfloat16',
                       help='(default: %(default)s)')
    speed.add_argument('--channels-last', action='store_true', help='use this memory format')
    speed.add_argument('--torchcompile', action='store_true', help='compile the network')
    command.add_argument('--output', default='evaluation', metavar='DIR',
                         help='figures, per-image values, and what a new start goes on from (default: %(default)s)')

    command = _add_command(
        commands, _explain, 'write saliency maps over images',
        'castream explain cat.jpg dog.jpg --model resnet50_castream --checkpoint last.pth.tar')
    command.add_argument('paths', nargs='*', metavar='IMAGE')
    command.add_argument('--images', metavar='DIR', help='explain every image below this folder')
    _add_model_options(command)
    _add_method_options(command, ('attention', 'grad_cam'))
    command.add_argument('--identity', action='store_true', help='draw both sides of eq. (5) too, and their difference')
    command.add_argument('--multilabel', action='store_true', help='probabilities by sigmoid')
    command.add_argument('--output', default='explained', metavar='DIR', help='(default: %(default)s)')

    command = _add_command(
        commands, _push, 'publish a trained model on the Hugging Face Hub',
        'castream push model_best.pth.tar --model resnet50_castream --repo me/resnet50_castream.sgd90_in1k')
    command.add_argument('checkpoint', metavar='CHECKPOINT', help="as timm's train.py writes it, or safetensors")
    command.add_argument('--model', required=True, help='name of the variant')
    command.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
    command.add_argument('--repo', required=True, metavar='ORG/NAME')
    command.add_argument('--use-ema', action='store_true', help='the averaged weights of the checkpoint')
    command.add_argument('--stream-only', action='store_true', help='leave the backbone out: it comes from timm')
    command.add_argument('--backbone-tag',
                         help="timm's weights on which the stream was trained (default: the variant's)")
    command.add_argument('--own-backbone', action='store_true',
                         help="with --stream-only: it was trained on weights that are not timm's")
    command.add_argument('--metrics', metavar='FILE', help='evaluation.json of castream evaluate, for the model card')
    command.add_argument('--dataset', help='name of the training data on the Hub')
    command.add_argument('--private', action='store_true', help='make the repository private')
    command.add_argument('--dry-run', metavar='DIR', help='write the folder and upload nothing')

    command = _add_command(
        commands, _demo, 'train a CA-Stream on real pixels and compare its saliency, in minutes',
        'castream demo --output demo_output')
    command.add_argument('--output', default='demo_output', metavar='DIR', help='(default: %(default)s)')
    command.add_argument('--seed', type=int, default=0, help='(default: %(default)s)')
    command.add_argument('--quick', action='store_true', help='under a minute: shows that it runs, not what it can do')
    return parser


def _add_command(commands: Any, command: Callable[[argparse.Namespace], int], text: str, example: str) -> Any:
    name = command.__name__.removeprefix('_')
    parser = commands.add_parser(
        name, help=text, description=f'{text[0].upper()}{text[1:]}.', epilog=f'example:\n  {example}',
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    parser.set_defaults(command=command, name=name)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('model')
    group.add_argument('--model', required=True, help='name of a variant, hf-hub:ORG/NAME or local-dir:DIR')
    group.add_argument('--pretrained', action='store_true', help="with the model's published weights")
    group.add_argument('--checkpoint', metavar='FILE_OR_HUB_ID',
                       help="weights: of timm's train.py, safetensors, or ORG/NAME on the Hub")
    group.add_argument('--use-ema', action='store_true', help='the averaged weights of the checkpoint')
    group.add_argument('--num-classes', type=int, help="other than the model's own")
    group.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
    group.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                       help='(default: %(default)s)')


def _add_method_options(parser: argparse.ArgumentParser, methods: Sequence[str]) -> None:
    group = parser.add_argument_group('saliency')
    group.add_argument('--methods', nargs='+', default=list(methods),
                       choices=('attention', 'grad_cam', 'grad_cam_pp', 'score_cam'), help='(default: %(default)s)')
    group.add_argument('--poolings', nargs='+', default=list(POOLINGS), choices=POOLINGS, help='(default: %(default)s)')
    group.add_argument('--layer', help='another module than the pooled stage for the CAM methods')


if __name__ == '__main__':
    sys.exit(main())
