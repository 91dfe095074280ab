"""Prepare the command line of timm's scripts.

timm replaces the `model_kwargs` of a config file by `--model-kwargs` of the command line, so `freeze_backbone` of a
recipe would be lost without a word. Here the two are merged. Recipes are found by name. Options that would skip the
stream, and files and folders that do not exist, are refused. The statistics of a frozen backbone are not averaged. A
recipe's mixed precision is left out on a CPU.
"""

from __future__ import annotations

import logging
import pickle
import zipfile
from argparse import SUPPRESS, ArgumentError, ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from ..backbones.architectures import unknown_name_message

RECIPES = Path(str(files('train_wrappers') / 'recipes'))

_logger = logging.getLogger(__name__)


@dataclass
class CommandLine:
    """The command line for timm's script.

    Attributes:
        argv: The user's options, followed by those that replace them.
        args: The options that the script will read.
        recipe: The recipe's name, or ''.
        recipe_options: The options of the recipe.
    """

    argv: list[str]
    args: Namespace
    recipe: str = ''
    recipe_options: dict[str, Any] = field(default_factory=dict)

    def download_of_recipe(self) -> str:
        """A sentence that names the option of the recipe which needs a download, or ''."""
        kwargs = self.recipe_options.get('model_kwargs') or {}
        for option, asked in (
            ('pretrained', self.recipe_options.get('pretrained')),
            ('backbone_pretrained', kwargs.get('backbone_pretrained')),
        ):
            if asked:
                return f'`{option}: {str(asked).lower()}` of {self.recipe} asks for the weights of {self.args.model}.'
        return ''


def prepare(script: Mapping[str, Any], argv: Sequence[str]) -> CommandLine:
    """The command line for timm's script.

    Args:
        script: The globals of the script: its `parser`, and `config_parser` where it takes a config file.
        argv: The user's options without those of the wrapper.

    Returns:
        `argv`, followed by the path of a recipe given by name, by the merged `--model-kwargs`, by `--dist-bn ''` for a
        frozen backbone, by `--device` where the script's own is not there, by `--amp` where `--amp-dtype` is given alone
        and by `--no-amp` for a recipe's `amp` on a CPU. argparse takes the last one.

    Raises:
        ValueError: A file, folder or name in an option does not exist, or the option does not work with a stream.
    """
    recipe: dict[str, Any] = {}
    name = ''
    added: list[str] = []
    options = list(argv)
    if 'config_parser' in script:
        config, options = script['config_parser'].parse_known_args(argv)
        if config.config:
            path = find_recipe(config.config)
            name, recipe = path.name, read_recipe(path)
            added += ['--config', str(path)]
    add_no_amp(script['parser'])
    typed = script['parser'].parse_args(options)
    merged = {**(recipe.get('model_kwargs') or {}), **typed.model_kwargs}
    if merged != typed.model_kwargs:
        added += ['--model-kwargs', *(f'{key}={value!r}' for key, value in merged.items())]
    # Values that a namespace already holds take the place of the parser's defaults, as timm's set_defaults does.
    args = script['parser'].parse_args(options, Namespace(**{**recipe, 'model_kwargs': {}}))

    def is_typed(option: str) -> bool:
        return getattr(script['parser'].parse_args(options, Namespace(**{option: None})), option, None) is not None

    device = str(getattr(args, 'device', ''))
    if (
        device.startswith('cuda')
        and not torch.cuda.is_available()
        and not is_typed('device')
        and 'device' not in recipe
    ):
        args.device = device = 'mps' if torch.backends.mps.is_available() else 'cpu'
        added += ['--device', device]
        _logger.warning('There is no CUDA device here: --device %s.', device)
    amp = getattr(typed, 'amp', False)
    if not amp and 'amp' not in recipe and is_typed('amp_dtype'):
        amp = True
        added.append('--amp')
        _logger.warning('--amp-dtype asks for mixed precision: --amp.')
    if amp and device == 'cpu':
        _logger.warning('Mixed precision on a CPU was 6 times as slow as float32 where it was tried.')
    _check_there(args)
    if 'castream' in args.model:
        _check_stream(args, merged)
    if merged.get('freeze_backbone') and getattr(args, 'dist_bn', ''):
        # Averaging frozen statistics over processes, timm's default, changes their last bits.
        added += ['--dist-bn', '']
    if recipe.get('amp') and not amp and device == 'cpu':
        _logger.warning(
            '%s asks for mixed precision, which is left out: a CPU computes it slowly. --amp asks for it.', name
        )
        added.append('--no-amp')
    return CommandLine([*argv, *added], args, name, recipe)


def add_no_amp(parser: ArgumentParser) -> None:
    """Adds `--no-amp` to a script of timm, whose `--amp` cannot be taken back once a config file has set it."""
    with suppress(ArgumentError):  # a script that has it
        parser.add_argument('--no-amp', dest='amp', action='store_false', default=SUPPRESS, help='no mixed precision')


def find_recipe(name: str) -> Path:
    """The config file `name`, or the packaged recipe of that name, with or without its `.yaml`."""
    for path in (Path(name), RECIPES / name, RECIPES / f'{name}.yaml'):
        if path.is_file():
            return path
    packaged = ', '.join(sorted(path.name for path in RECIPES.glob('*.yaml')))
    raise ValueError(f'There is no config file {name}; the packaged recipes are {packaged}.')


def read_recipe(path: Path) -> dict[str, Any]:
    """The options of a timm config file."""
    try:
        recipe = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is not a YAML file: {" ".join(str(error).split())}') from error
    if not isinstance(recipe, dict):
        raise ValueError(f'{path} holds no options: a config file is a YAML mapping of option names to values.')
    return recipe


def _check_there(args: Namespace) -> None:
    """Raises one sentence for mistakes that timm answers with a traceback. The two scripts have different options."""
    model, folder = args.model, getattr(args, 'data_dir', None) or getattr(args, 'data', None)
    # validate.py also takes a wildcard, a file of names, and `all`.
    if not (':' in model or timm.is_model(model) or timm.list_models(model) or Path(model).is_file() or model == 'all'):
        raise ValueError(unknown_name_message(model))
    if hasattr(args, 'checkpoint') and not args.checkpoint and not args.pretrained and model.endswith('_castream'):
        # timm's validate.py would then look for published weights.
        raise ValueError(
            'There are no weights to validate: name them with --checkpoint, or pass --pretrained for published ones.'
        )
    if '/' not in args.dataset and args.dataset != 'digits' and (not folder or not Path(folder).exists()):
        raise ValueError(
            f'There is no folder {folder}.'
            if folder
            else 'There is nothing to read: name a folder with --data-dir, or a data set that needs none with --dataset.'
        )
    for option in ('resume', 'initial_checkpoint', 'checkpoint'):
        path = getattr(args, option, None)
        if path and not Path(path).exists():
            raise ValueError(f'There is no {path}, which --{option.replace("_", "-")} names.')
        if path and option == 'resume' and Path(path).is_file():
            _check_whole(Path(path))
    if str(getattr(args, 'device', '')).startswith('cuda') and not torch.cuda.is_available():
        raise ValueError('There is no CUDA device here; --device cpu works everywhere.')


def _check_whole(path: Path) -> None:
    """Raises ValueError for a checkpoint that was cut off. timm ends in an EOFError without its name."""
    # torch.save writes zip files, whose list of contents is at the end; older files are read to the end.
    if path.suffix == '.safetensors' or zipfile.is_zipfile(path):
        return
    try:
        with torch.serialization.safe_globals([Namespace]):
            torch.load(path, map_location='cpu', weights_only=True)
    except (EOFError, OSError, RuntimeError, pickle.UnpicklingError):
        raise ValueError(f'{path}, which --resume names, is damaged or no checkpoint.') from None


def _check_stream(args: Namespace, model_kwargs: Mapping[str, Any]) -> None:
    def value(name: str) -> Any:
        return getattr(args, name, None)  # validate.py has other options than train.py

    if value('test_pool'):
        raise ValueError('--test-pool pools by itself and would skip the stream without a word; leave it out.')
    if value('torchscript'):
        raise ValueError('--torchscript cannot see the hooks that a stream runs in; use --torchcompile or nothing.')
    if value('clip_grad') is not None and 'agc' in value('clip_mode'):
        raise ValueError(
            '--clip-mode agc spares the last two parameters, taking them for the classifier; here they are the '
            'last ones of the stream. Use --clip-mode norm.'
        )
    if model_kwargs.get('stream_class_specific'):
        if value('mixup') or value('cutmix') or value('cutmix_minmax'):
            raise ValueError(
                "A class specific stream starts from the query of an image's one target class, and --mixup and "
                '--cutmix give an image several; leave them out.'
            )
        if value('kd_model_name'):
            raise ValueError(
                'A class specific stream needs the labels, which the distillation of --kd-model-name does not hand on.'
            )
