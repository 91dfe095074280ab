"""Reads the code blocks of a page and runs them as a reader would: in order, in one folder, in one session."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Each command has a process of its own, forked from one that has imported torch and timm and nothing else: seconds less
# than a new interpreter.
FRESH = multiprocessing.get_context('forkserver')
FRESH.set_forkserver_preload(['torch', 'timm', 'timm_castream.cli'])

FENCE = re.compile(
    r'(?:<!-- not run: (?P<reason>.+?) -->\s*\n)?'
    r'^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)```$',
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its code, and the reason that the page gives for not running it."""

    language: str
    code: str
    line: int
    reason: str | None


@dataclass
class Session:
    """The folder and the Python names that the blocks of a page share."""

    folder: Path
    names: dict[str, Any] = field(default_factory=lambda: {'__name__': '__main__'})
    output: str = ''

    def run(self, block: Block) -> None:
        if block.language == 'python':
            self.run_python(block)
        else:
            for command in commands(block.code):
                self.run_command(command)

    def run_python(self, block: Block) -> None:
        # The empty lines in front let a traceback show the line of the page.
        code = compile('\n' * block.line + block.code, 'page', 'exec')
        printed = io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(printed):
            exec(code, self.names)
        self.output += printed.getvalue()

    def run_command(self, command: list[str]) -> None:
        if command[0] == 'castream':
            with tempfile.TemporaryDirectory() as folder:
                outputs = [Path(folder, name) for name in ('stdout', 'stderr')]
                process = FRESH.Process(target=castream, args=(command[1:], self.folder, *outputs))
                process.start()
                process.join()
                status, printed, errors = process.exitcode, *(path.read_text(encoding='utf-8') for path in outputs)
        elif command[0] == 'python':
            done = subprocess.run([sys.executable, *command[1:]], cwd=self.folder, capture_output=True, text=True)
            status, printed, errors = done.returncode, done.stdout, done.stderr
        else:
            raise ValueError(f'The runner knows no command {command[0]}.')
        self.output += printed
        if status:
            raise RuntimeError(f'{shlex.join(command)} ended with {status}:\n{printed}\n{errors}')


def castream(arguments: list[str], folder: Path, stdout: Path, stderr: Path) -> None:
    """Runs the command in a folder, in this process, with its output in two files."""
    for path, stream in ((stdout, 1), (stderr, 2)):
        with path.open('wb') as file:
            os.dup2(file.fileno(), stream)
    os.chdir(folder)

    from timm_castream.cli import main

    sys.exit(main(arguments))


def read_blocks(page: Path) -> list[Block]:
    """The blocks of a page in order; of Python and of the shell."""
    text = page.read_text(encoding='utf-8')
    blocks = []
    for match in FENCE.finditer(text):
        if match['language'] in ('python', 'bash'):
            indent = match['indent']
            code = ''.join(line.removeprefix(indent) for line in match['code'].splitlines(keepends=True))
            line = text.count('\n', 0, match.start('code'))
            blocks.append(Block(match['language'], code, line, match['reason']))
    return blocks


def commands(code: str) -> list[list[str]]:
    """The commands of a block of the shell, without comments."""
    lines = code.replace('\\\n', ' ').splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]
