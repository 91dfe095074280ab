"""Run a script of timm in this process with timm_castream loaded."""

from __future__ import annotations

import argparse
import errno
import os
import runpy
import signal
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import timm
import timm.data
import timm.task
import timm.utils
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from .._utils.interrupts import interruptible
from .._utils.keywords import ParseKwargs
from ..datasets import create_dataset
from . import multilabel
from .arguments import prepare
from .data import DataChecks
from .finder import ScriptNotFoundError, find_script, script_release
from .task import CAStreamTask

_BROKEN_PIPE = 141  # as shells report it
_LONGEST = 600  # letters of a message

_EXAMPLES = {
    'train.py': 'castream train -c imagenet_sgd90.yaml --data-dir /data/imagenet',
    'validate.py': 'castream validate --model resnet50_castream --checkpoint last.pth.tar --data-dir /data/imagenet',
}


def run_script(name: str, argv: Sequence[str] | None = None) -> int:
    """Runs timm's script `name` with every option that is not the wrapper's own.

    Args:
        name: `train.py` or `validate.py`.
        argv: The command line after the program's name; `sys.argv[1:]` by default.

    Returns:
        The exit code: 0; 2 for a mistake, explained in one line on the standard error; 1 after the traceback of a crash
        of the script; 130 when interrupted; 141 where the reader of its output stopped reading.
    """
    parser = _parser(name)
    own, options = parser.parse_known_args(argv)
    script = ''
    try:
        if own.help:
            parser.print_help()
            options.append('--help')
        path = find_script(name, own.timm_script)
        script = f' ({path} of {script_release(path)}, timm {timm.__version__})'
        with interruptible(signal.SIGINT, signal.SIGTERM) as signals:
            _run(path, options, parser)
            if signals:  # timm's scripts end without an error then
                raise KeyboardInterrupt
        sys.stdout.flush()
    except SystemExit as stop:  # argparse's way out
        with _open_pipe() as closed:
            sys.stdout.flush()
        return _BROKEN_PIPE if closed else stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except KeyboardInterrupt:
        print(f'{parser.prog}: interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:  # castream train --help | head
        with _open_pipe():
            raise
        return _BROKEN_PIPE
    except Exception as error:
        if own.help and isinstance(error, ScriptNotFoundError):
            print(error)
            return 0
        mistake = isinstance(error, (ScriptNotFoundError, ValueError, ImportError, OSError)) or _is_ours(error)
        if own.debug or not mistake:
            traceback.print_exc()
        message = ' '.join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            message += f': the disk of {_output_folder(options)} is full'
        if len(message) > _LONGEST:  # torch lists every key of a state dict that does not fit
            message = f'{message[:_LONGEST]} ...'
        print(f'{parser.prog}: {message}{script}', file=sys.stderr)
        return 2 if mistake else 1
    return 0


@contextmanager
def _open_pipe() -> Iterator[list[BrokenPipeError]]:
    """Catches a pipe that its reader has closed, and writes what is left to nowhere: Python flushes when it exits."""
    errors: list[BrokenPipeError] = []
    try:
        yield errors
    except BrokenPipeError as error:
        errors.append(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _output_folder(options: Sequence[str]) -> str:
    """The folder in which timm's script writes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--output', default='output')
    return parser.parse_known_args(options)[0].output


def _parser(name: str) -> argparse.ArgumentParser:
    command = Path(name).stem
    parser = argparse.ArgumentParser(
        prog=f'castream {command}',
        usage=f"castream {command} [--timm-script PATH] [--debug] [options of timm's {name}]",
        description=f"Runs timm's {name} unchanged with timm_castream loaded.",
        epilog=f"example: {_EXAMPLES[name]}\n\nThe options of timm's {name}:\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument('-h', '--help', action='store_true', help="show these options and those of timm's script")
    parser.add_argument(
        '--timm-script',
        metavar='PATH',
        help=f'the {name} to run (default: TIMM_{command.upper()}_SCRIPT, beside an editable timm, the cache, GitHub)',
    )
    parser.add_argument('--debug', action='store_true', help='show the traceback of every error')
    return parser


def _is_ours(error: Exception) -> bool:
    """Whether timm_castream raised the error: its message is a sentence for the user."""
    *_, last = traceback.walk_tb(error.__traceback__)
    return Path(__file__).parents[1] in Path(last[0].f_code.co_filename).parents


def _run(path: Path, options: list[str], parser: argparse.ArgumentParser) -> None:
    def one_line(message: str) -> NoReturn:
        raise ValueError(f'{message} (see {parser.prog} --help)')

    score = multilabel.MultiLabelScore()
    checks = DataChecks(argparse.Namespace())
    with _replaced(
        (sys, 'argv', [str(path)]),
        (timm.data, 'create_dataset', create_dataset),
        (timm.task, 'ClassificationTask', CAStreamTask),
        (timm.utils, 'ParseKwargs', ParseKwargs),
        (timm.utils, 'accuracy', score.accuracy),
        (timm.utils, 'CheckpointSaver', checks.create_saver(timm.utils.CheckpointSaver)),
    ):
        # Under another name than __main__ the script defines its functions and does not start.
        defined = runpy.run_path(str(path), run_name=f'timm_{path.stem}')
        missing = [name for name in ('parser', 'main', 'validate') if name not in defined]
        if missing:
            raise ValueError(f'{path} is not a training or validation script of timm: it has no {missing[0]}')
        script = defined['main'].__globals__
        script['validate'] = score.scored(script['validate'])
        script['nn'] = _nn_with(CrossEntropyLoss=multilabel.CrossEntropyLoss)
        script['parser'].error = one_line  # in place of timm's, which prints all its options
        command = prepare(script, options)
        checks.set_args(command.args)
        for name in ('create_model', 'create_dataset', 'create_loader'):
            if name in script:
                script[name] = getattr(checks, name)(script[name])
        sys.argv += command.argv
        try:
            script['main']()
        except Exception as error:
            reason = command.download_of_recipe()
            if reason and _is_missing_download(error):
                raise OSError(f'{" ".join(str(error).split())} {reason}') from error
            raise


def _is_missing_download(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _nn_with(**replacements: Any) -> types.ModuleType:
    """A copy of the names of `torch.nn` with these replaced: the script alone sees them, not the whole process."""
    module = types.ModuleType('torch.nn')
    module.__dict__.update(vars(torch.nn), **replacements)
    return module


@contextmanager
def _replaced(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    """Sets attributes, given as (owner, name, value), and puts the old values back."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    try:
        for owner, name, value in replacements:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
