"""castream evaluate ends in the same images.csv when it is killed, started twice, out of disk, or distributed."""

from __future__ import annotations

import csv
import errno
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import timm_castream  # noqa: F401 registers the models
from timm_castream import cli
from timm_castream.evaluation.resume import Journal

pytestmark = pytest.mark.slow

NUM_IMAGES, BROKEN = 20, (3, 4, 11)


@pytest.fixture(scope='module')
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A checkpoint and an image folder with three unreadable files."""
    folder = tmp_path_factory.mktemp('evaluation')
    torch.manual_seed(0)
    save_file(timm.create_model('test_resnet_castream', num_classes=2).state_dict(), folder / 'model.safetensors')
    rng = np.random.default_rng(0)
    for index in range(NUM_IMAGES):
        path = folder / 'images' / f'class{index % 2}' / f'{index:02d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        if index in BROKEN:
            path.write_bytes(path.read_bytes()[:200])
    return [
        'evaluate',
        '--model',
        'test_resnet_castream',
        '--num-classes',
        '2',
        '--checkpoint',
        str(folder / 'model.safetensors'),
        '--data-dir',
        str(folder / 'images'),
        '--img-size',
        '64',
        '--methods',
        'grad_cam',
        'random',
        '--device',
        'cpu',
        '-b',
        '2',
        '-j',
        '0',
    ]


@pytest.fixture(scope='module')
def expected(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """images.csv of the uninterrupted run."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    assert cli.main([*arguments, '--output', str(folder)]) == 1, 'the exit code tells that images were skipped'
    return (folder / 'images.csv').read_text()


def start(argv: Sequence[str], *prefix: str) -> subprocess.Popen[str]:
    command = [sys.executable, *(prefix or ('-m', 'timm_castream.cli')), *argv]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_records(folder: Path, process: subprocess.Popen[str]) -> None:
    journal = folder / 'finished.0.jsonl'
    while not (journal.exists() and len(journal.read_bytes().splitlines()) > 2):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_a_killed_run_goes_on(arguments: list[str], expected: str, tmp_path: Path) -> None:
    argv = [*arguments, '--output', str(tmp_path)]
    process = start(argv)
    wait_for_records(tmp_path, process)
    process.kill()
    process.communicate()
    assert not (tmp_path / 'images.csv').exists()
    assert cli.main(argv) == 1
    assert (tmp_path / 'images.csv').read_text() == expected


def test_a_second_start_is_refused_and_the_first_ends_well(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = [*arguments, '--output', str(tmp_path)]
    process = start(argv)
    wait_for_records(tmp_path, process)
    process.send_signal(signal.SIGSTOP)
    try:
        assert cli.main(argv) == 2
    finally:
        process.send_signal(signal.SIGCONT)
    assert 'Another evaluation is writing to' in capsys.readouterr().err
    process.communicate()
    assert process.returncode == 1
    assert (tmp_path / 'images.csv').read_text() == expected


def test_a_full_disk_loses_no_finished_batch(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    argv = [*arguments, '--output', str(tmp_path)]
    append, count = Journal.append, 0

    def full(self: Journal, record: Any) -> None:
        nonlocal count
        count += 1
        if count > 3:
            with open(self.path, 'ab') as file:
                file.write(b'\n{"rows": [[0.0, 1.')  # a part of the line
            raise OSError(errno.ENOSPC, 'No space left on device')
        append(self, record)

    monkeypatch.setattr(Journal, 'append', full)
    assert cli.main(argv) == 2
    assert 'No space left on device' in capsys.readouterr().err
    monkeypatch.setattr(Journal, 'append', append)
    assert cli.main(argv) == 1
    assert (tmp_path / 'images.csv').read_text() == expected


def test_two_processes_measure_the_same_and_name_the_unreadable_images(
    arguments: list[str], expected: str, tmp_path: Path
) -> None:
    process = start(
        [*arguments, '--output', str(tmp_path)],
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc-per-node',
        '2',
        '-m',
        'timm_castream.cli',
    )
    out, err = process.communicate(timeout=500)
    assert '3 images could not be read' in out, err
    assert all(f'{index:02d}.png' in out for index in BROKEN)
    assert process.returncode != 0
    found, wanted = (
        list(csv.DictReader(io.StringIO(text))) for text in ((tmp_path / 'images.csv').read_text(), expected)
    )
    assert len(found) == len(wanted) == NUM_IMAGES - len(BROKEN)
    for line, other in zip(found, wanted, strict=True):
        assert line.keys() == other.keys() and line.pop('file') == other.pop('file')
        for column, cell in line.items():
            assert float(cell or 'nan') == pytest.approx(float(other[column] or 'nan'), abs=1e-3, nan_ok=True), column
