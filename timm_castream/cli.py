"""The command `castream`: it finds the command's module in `commands` and runs it.

An error is one line that says what to do, with exit code 2. `--debug` shows the traceback. A command's module is
imported when the command runs.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType
from typing import NoReturn

from ._utils.interrupts import interruptible
from ._utils.near import did_you_mean
from .commands import COMMANDS
from .commands.wording import Formatter, Wording, sentence
from .version import __version__

USER_ERROR = 2
INTERRUPTED = 130  # as shells report Ctrl-C
BROKEN_PIPE = 141  # as shells report it

# Libraries of the extras in setup.cfg, by the name that is imported.
EXTRAS = {
    **dict.fromkeys(('torchmetrics', 'scipy', 'matplotlib'), 'eval'),
    **dict.fromkeys(('onnxruntime', 'onnx', 'onnxscript'), 'fast'),
    'skimage': 'demo',
    'sklearn': 'demo',
    'gradio': 'app',
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit code: 0; 1 where a part of the work was skipped; 2 for an error; 130 after Ctrl-C or SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv and argv[0] in COMMANDS else _parse_command(argv)
    if name in ('train', 'validate'):  # every option goes to timm's script, --help and --debug too
        from .timm_scripts.run import run_script

        return run_script(f'{name}.py', argv[1:])
    command = importlib.import_module(f'.commands.{name.replace("-", "_")}', __package__)
    parser = _command_parser(name, command)
    args = parser.parse_args(argv[1:])
    wording = Wording(parser, getattr(command, 'PHRASES', None))
    try:
        with _logging(wording), interruptible(signal.SIGTERM):
            code = command.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print('castream: interrupted', file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # castream list | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
        return BROKEN_PIPE
    except ModuleNotFoundError as error:
        if args.debug:
            raise
        library = str(error.name).partition('.')[0]
        package = f'"timm_castream[{EXTRAS[library]}]"' if library in EXTRAS else library
        print(f'castream {name} needs {library}: pip install {package}', file=sys.stderr)
        return USER_ERROR
    except Exception as error:
        if args.debug:
            raise
        print(f'castream {name}: {wording(sentence(error))}', file=sys.stderr)
        return USER_ERROR


@contextmanager
def _logging(wording: Wording) -> Iterator[None]:
    """Prints what the package logs inside, in the words of a command. Handlers that a program has set stay."""
    root, package = logging.getLogger(), logging.getLogger('timm_castream')
    handlers, level = list(root.handlers), package.level
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter('%(message)s', wording))
    handler.addFilter(lambda record: not record.name.startswith('huggingface_hub'))  # prints by itself
    logging.basicConfig(handlers=[handler])
    package.setLevel(logging.INFO)  # not the HTTP client's requests
    try:
        yield
    finally:
        root.handlers[:] = handlers
        package.setLevel(level)


class _Parser(argparse.ArgumentParser):
    """Explains a mistake in one line, as the commands do."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f'{self.prog}: {message} (see {self.prog} --help)\n')


def _parse_command(argv: Sequence[str]) -> str:
    """Ends the process with the help, the version, or an error about the command."""
    parser = _Parser(
        prog='castream',
        description='CA-Stream attention pooling and saliency for timm models.',
        epilog='castream COMMAND --help shows the options of a command and an example.',
    )
    parser.add_argument('--version', action='version', version=f'timm_castream {__version__}, timm {version("timm")}')
    if argv and not argv[0].startswith('-'):
        hint = did_you_mean(argv[0], COMMANDS)
        parser.error(f'command {argv[0]!r} is unknown{hint}, valid ones: {", ".join(COMMANDS)}')
    commands = parser.add_subparsers(metavar='COMMAND', dest='command', required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    return parser.parse_args(argv).command


def _command_parser(name: str, command: ModuleType) -> argparse.ArgumentParser:
    text = COMMANDS[name]
    parser = _Parser(
        prog=f'castream {name}',
        description=f'{text[0].upper()}{text[1:]}.',
        epilog=f'example:\n  {command.EXAMPLE}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    command.add_options(parser)
    return parser


if __name__ == '__main__':
    sys.exit(main())
