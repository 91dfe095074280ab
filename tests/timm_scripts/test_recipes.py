"""The recipes, read by timm's own parser: optimiser, learning rate at each epoch's start, and what is frozen."""

from __future__ import annotations

import math
import runpy
from argparse import ArgumentParser, Namespace

import pytest
import timm
import timm.data
import torch
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

import timm_castream  # noqa: F401
from timm_castream._utils.keywords import ParseKwargs
from timm_castream.timm_scripts import finder
from timm_castream.timm_scripts.arguments import RECIPES, find_recipe, read_recipe

THIRDS = [0.1] * 30 + [0.01] * 30 + [0.001] * 30
TENTHS = [rate / 10 for rate in THIRDS]
# Learning rate of each epoch with all processes of the recipe's comment, and how many these are.
EXPECTED = {
    'imagenet_sgd90': (THIRDS, 8),
    'cub200_gap': (TENTHS, 1),
    'cub200': (THIRDS, 1),
    'cub200_joint': (TENTHS, 1),
    'voc2012_gap': (TENTHS, 1),
    'voc2012': (THIRDS, 1),
    'voc2012_joint': (TENTHS, 1),
    'digits_gap': ([4e-3 * (1 + math.cos(math.pi * epoch / 8)) / 2 for epoch in range(8)], 1),
    'digits': ([4e-3, 2e-3], 1),
    'own_data': ([1e-4 * (1 + math.cos(math.pi * epoch / 2)) / 2 for epoch in range(2)], 1),
}
FROZEN = {'imagenet_sgd90', 'cub200', 'voc2012', 'digits', 'own_data'}


def outline() -> ArgumentParser:
    """Those of train.py's options that the optimiser, the scheduler and the model need, with its defaults."""
    parser = ArgumentParser()
    for name, default in {'lr': None, 'lr_base': 0.1, 'lr_base_size': 256, 'momentum': 0.9}.items():
        parser.add_argument(f'--{name}', type=float, default=default)
    parser.add_argument('--grad-accum-steps', type=int, default=1)
    for name in ('model_kwargs', 'opt_kwargs'):
        parser.add_argument(f'--{name.replace("_", "-")}', nargs='*', default={}, action=ParseKwargs)
    parser.set_defaults(
        dataset='',
        train_split='train',
        val_split='validation',
        img_size=None,
        bce_target_thresh=None,
        sched_on_updates=False,
    )
    return parser


@pytest.fixture(scope='session')
def real_parser():
    """The parser of timm's train.py, from wherever the wrapper finds it."""
    try:
        return runpy.run_path(str(finder.find_script('train.py')), run_name='timm_train')['parser']
    except finder.ScriptNotFoundError as error:
        pytest.skip(f"timm's train.py is not to be had here: {error}")


@pytest.fixture(params=['outline', 'train.py'])
def parser(request):
    return outline() if request.param == 'outline' else request.getfixturevalue('real_parser')


def parse(parser: ArgumentParser, name: str, *options: str) -> Namespace:
    """The arguments that train.py works with, as its own `_parse_args` makes them of a config file."""
    before = {action.dest: action.default for action in parser._actions}
    try:
        parser.set_defaults(**read_recipe(find_recipe(name)))
        return parser.parse_args(list(options))
    finally:
        parser.set_defaults(**before)


def learning_rate(args: Namespace, world_size: int) -> float:
    """What train.py's main() makes of lr, lr_base and the global batch; its scaling is linear for SGD."""
    return args.lr or args.lr_base * args.batch_size * world_size * args.grad_accum_steps / args.lr_base_size


def small_model(args: Namespace) -> torch.nn.Module:
    """A quick stand-in for the recipe's model, without the weights that it would start from."""
    kwargs = {key: value for key, value in args.model_kwargs.items() if not key.startswith('backbone_')}
    return timm.create_model('test_resnet_castream' if 'castream' in args.model else 'test_resnet', **kwargs)


def test_every_recipe_is_tested_here():
    assert {path.stem for path in RECIPES.glob('*.yaml')} == EXPECTED.keys()


@pytest.mark.parametrize('name', EXPECTED)
def test_a_recipe_opens_with_what_it_reproduces_and_how_to_run_it(name):
    text = (RECIPES / f'{name}.yaml').read_text()
    comment = text[: text.index('\n', text.rindex('\n#') + 1)] if text.startswith('#') else ''
    assert f'-c {name}.yaml' in comment


@pytest.mark.parametrize('name', EXPECTED)
def test_every_key_is_an_option_of_timms_script(real_parser, name):
    # Up to v1.0.28 the script takes a misspelt one in silence.
    assert read_recipe(find_recipe(name)).keys() <= {action.dest for action in real_parser._actions}


@pytest.mark.filterwarnings('ignore:freeze_backbone freezes a classifier')
@pytest.mark.parametrize('name', EXPECTED)
def test_the_learning_rate_of_every_epoch(parser, name):
    rates, world_size = EXPECTED[name]
    args = parse(parser, name)
    args.lr = learning_rate(args, world_size)
    optimizer = create_optimizer_v2(small_model(args), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=10)
    assert epochs == len(rates)
    for epoch, rate in enumerate(rates):
        if epoch:
            scheduler.step(epoch)
        assert [group['lr'] for group in optimizer.param_groups] == pytest.approx([rate] * len(optimizer.param_groups))
        for update in range(10):
            if not args.sched_on_updates:  # within the epoch it stays
                assert optimizer.param_groups[0]['lr'] == pytest.approx(rate)
            scheduler.step_update(epoch * 10 + update + 1)


@pytest.mark.filterwarnings('ignore:freeze_backbone freezes a classifier')
@pytest.mark.parametrize('name', EXPECTED)
def test_the_optimiser_has_the_stream_alone_where_the_backbone_is_frozen_and_everything_elsewhere(parser, name):
    args = parse(parser, name, '--lr', '0.1')
    model = small_model(args)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group['params']}
    part = model.castream if name in FROZEN else model
    assert trained == {id(parameter) for parameter in part.parameters()}


@pytest.mark.parametrize('name', sorted(EXPECTED.keys() - {'digits', 'digits_gap', 'own_data'}))
def test_the_papers_sgd_is_plain_and_decays_every_parameter(parser, name):
    args = parse(parser, name, '--lr', '0.1', '--model-kwargs')
    optimizer = create_optimizer_v2(small_model(args), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    assert type(optimizer) is torch.optim.SGD
    for group in optimizer.param_groups:
        assert (group['momentum'], group['dampening'], group['nesterov']) == (0.9, 0, False)
        assert group['weight_decay'] == 1e-4


def test_the_global_batch_is_256_on_any_number_of_accelerators(parser):
    for world_size, steps in ((8, 1), (4, 2), (2, 4), (1, 8)):
        args = parse(parser, 'imagenet_sgd90', '--grad-accum-steps', str(steps))
        assert args.batch_size * world_size * args.grad_accum_steps == 256
        assert learning_rate(args, world_size) == pytest.approx(0.1)


def test_the_papers_augmentation_is_crop_and_flip_alone(real_parser):
    args = parse(real_parser, 'imagenet_sgd90')
    transform = timm.data.create_transform(
        (3, 224, 224),
        is_training=True,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
    )
    crop, *rest = transform.transforms
    assert (tuple(crop.scale), tuple(crop.size)) == ((0.08, 1.0), (224, 224))
    assert tuple(crop.ratio) == pytest.approx((3 / 4, 4 / 3))
    assert 'bilinear' in repr(crop)
    assert type(rest[0]).__name__ == 'RandomHorizontalFlip'
    assert not {type(step).__name__ for step in rest} & {'ColorJitter', 'RandomVerticalFlip', 'RandomErasing'}
    assert (args.smoothing, args.mixup, args.cutmix, args.amp, args.dist_bn) == (0.0, 0.0, 0.0, True, '')


@pytest.mark.parametrize('name', ['cub200', 'voc2012', 'digits'])
def test_the_second_step_reads_what_the_first_one_writes(parser, name):
    first, second = parse(parser, f'{name}_gap'), parse(parser, name)
    assert second.model_kwargs['backbone_checkpoint'] == f'output/train/{first.experiment}/last.pth.tar'
    assert second.model == f'{first.model.split(".")[0]}_castream'
    for option in ('dataset', 'num_classes', 'train_split', 'val_split', 'img_size'):
        assert getattr(first, option) == getattr(second, option)


@pytest.mark.parametrize('name', ['voc2012_gap', 'voc2012', 'voc2012_joint'])
def test_voc_is_trained_with_binary_cross_entropy_that_timms_script_chooses(parser, name):
    args = parse(parser, name)
    assert args.bce_loss and args.smoothing and args.bce_target_thresh is None
    torch.manual_seed(0)
    loss = BinaryCrossEntropy(smoothing=args.smoothing, sum_classes=args.bce_sum)
    output, target = torch.randn(3, 20), (torch.rand(3, 20) < 0.2).float()
    probability = output.double().sigmoid()
    expected = -torch.where(target > 0, probability, 1 - probability).log().sum() / 3
    torch.testing.assert_close(loss(output, target).double(), expected)
