"""The folder of an evaluation: the lock, damaged files, and values of one image twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from timm_castream.evaluation.resume import Journal
from timm_castream.evaluation.values import ImageValues

SETTINGS = {'weights': 'abc', 'methods': ['grad_cam'], 'metrics': ['average_drop'], 'seed': None}


def record(*indices: int, value: float = 1.0) -> ImageValues:
    image = np.array(indices)
    return ImageValues(
        {'image': image, 'gap/accuracy': np.full(len(image), 100.0)},
        {'image': image, 'gap/class': np.full(len(image), 7), 'gap/a/average_drop': np.full(len(image), value)},
    )


def write(folder: Path, *records: ImageValues, rank: int = 0, settings: dict[str, Any] | None = None) -> None:
    journal = Journal(folder, rank)
    journal.lock()
    journal.resume(settings or SETTINGS)
    for each in records:
        journal.append(each)
    journal.close()


def read(folder: Path, settings: dict[str, Any] | None = None) -> ImageValues:
    journal = Journal(folder, 0)
    try:
        return journal.resume(settings or SETTINGS)
    finally:
        journal.close()


def assert_values(found: ImageValues, images: list[int], drops: list[float]) -> None:
    assert found.images['image'].tolist() == found.pairs['image'].tolist() == images
    assert found.pairs['gap/a/average_drop'].tolist() == drops
    assert found.pairs['gap/class'].tolist() == [7] * len(images)


def test_values_come_back_in_the_order_of_the_images(tmp_path: Path) -> None:
    write(tmp_path, record(2), record(0, 1, value=0.1))
    assert_values(read(tmp_path), [0, 1, 2], [0.1, 0.1, 1.0])


def test_an_image_recorded_twice_counts_once(tmp_path: Path) -> None:
    write(tmp_path, record(0, 1), record(1, 2, value=5.0), record(2, value=9.0))
    assert_values(read(tmp_path), [0, 1, 2], [1.0, 1.0, 5.0])


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    first, second = Journal(tmp_path, 0), Journal(tmp_path, 0)
    first.lock()
    with pytest.raises(ValueError, match='Another evaluation is writing to'):
        second.lock()
    first.close()
    second.lock()
    second.close()


def test_the_lock_of_a_killed_process_does_not_block(tmp_path: Path) -> None:
    code = (
        'import sys, time\nfrom pathlib import Path\nfrom timm_castream.evaluation.resume import Journal\n'
        'journal = Journal(Path(sys.argv[1]), 0)\njournal.lock()\nprint("locked", flush=True)\ntime.sleep(60)'
    )
    process = subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b'locked\n'
    journal = Journal(tmp_path, 0)
    with pytest.raises(ValueError, match='Another evaluation is writing to'):
        journal.lock()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    journal.lock()
    journal.close()


@pytest.mark.parametrize('content', [None, '', '{"weights": ', '[]'])
def test_missing_or_damaged_settings_are_named(content: str | None, tmp_path: Path) -> None:
    write(tmp_path, record(0))
    (tmp_path / 'settings.json').unlink()
    if content is not None:
        (tmp_path / 'settings.json').write_text(content)
    with pytest.raises(ValueError, match=r'settings\.json is missing or damaged.*delete .*, or name another folder'):
        read(tmp_path)


@pytest.mark.parametrize(
    'line',
    [
        'hello',
        '[1, 2]',
        '{"rows": [[0, 1]], "images": [[0, 100]]}',
        '{"images": 3, "pairs": 3}',
        'null',
        '{"images": {}, "pairs": {}}',
        '{"images": {"image": [0]}, "pairs": {"image": [0], "gap/prob": [1.0, 2.0]}}',
        '{"images": {"image": [0]}, "pairs": {"image": [0], "gap/prob": [null]}}',
    ],
)
def test_foreign_lines_are_named(line: str, tmp_path: Path) -> None:
    write(tmp_path, record(0))
    with open(tmp_path / 'finished.0.jsonl', 'a') as file:
        file.write(line + '\n')
    with pytest.raises(ValueError, match=r'finished\.0\.jsonl, line 3, is no record of this evaluation'):
        read(tmp_path)


def test_a_line_that_a_kill_cut_off_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, record(0), record(1))
    path = tmp_path / 'finished.0.jsonl'
    path.write_bytes(path.read_bytes()[:-9])
    assert_values(read(tmp_path), [0], [1.0])


def test_refusals_are_short(tmp_path: Path) -> None:
    settings = {**SETTINGS, **{f'key{i}': 'x' * 200 for i in range(6)}}
    write(tmp_path, record(0), settings=settings)
    with pytest.raises(ValueError, match='and 3 more') as error:
        read(tmp_path, {**SETTINGS, **{f'key{i}': 'y' * 200 for i in range(6)}})
    assert len(str(error.value)) < 700 and 'x' * 60 not in str(error.value)


def test_changed_images_are_named(tmp_path: Path) -> None:
    write(tmp_path, record(0), settings={**SETTINGS, 'images': 'one'})
    with pytest.raises(ValueError, match='The images have changed since the evaluation in'):
        read(tmp_path, {**SETTINGS, 'images': 'other'})


def test_temperatures_of_an_evaluation_that_finished_nothing_are_dropped(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / 'temperatures.json').write_text('{"gap": 2.0}')
    read(tmp_path)
    assert not (tmp_path / 'temperatures.json').exists()
    write(tmp_path, record(0))
    (tmp_path / 'temperatures.json').write_text('{"gap": 2.0}')
    read(tmp_path)
    assert (tmp_path / 'temperatures.json').exists()


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='file is a file: name a folder'):
        Journal(tmp_path / 'file', 0)


LONG = [f'a_long_name_{i}' for i in range(9)]


@pytest.mark.parametrize(
    ('one', 'other', 'said'),
    [
        ({'metrics': LONG}, {'metrics': LONG[1:]}, ["metrics=['a_long_name_0', ", ', ...]', "metrics=['a_long_name_1', "]),
        ({'kwargs': {'a': 'x' * 80}}, {}, ["kwargs={'a': 'xxx", "xxx...'}", 'this one has kwargs=None: name']),
        ({'path': 'p' * 80}, {'path': 'q'}, ["...', this one has path='q'"]),
        ({'transform': 'Compose(\n Resize' * 9}, {'transform': 'b'}, ['an evaluation with another transform than this one:']),
        ({'transform': 'a', 'img_size': 32, 'input_size': [3, 32, 32]}, {'transform': 'b', 'img_size': 64, 'input_size': [3, 64, 64]}, ['with img_size=32, this one has img_size=64: name']),
        ({'user_methods': {'f': 'a', 'g': 'b'}, 'seed': 1}, {'user_methods': {'f': 'a', 'g': 'c'}, 'seed': 2}, ["with seed=1, this one has seed=2 and another function or other maps for 'g': name"]),
        ({'weights': 'a', 'checkpoint': 'x.pth'}, {'weights': 'b', 'checkpoint': 'x.pth'}, ['with other weights (x.pth has changed) than this one: name']),
        ({'weights': 'a', 'checkpoint': 'x.pth'}, {'weights': 'b', 'checkpoint': 'y.pth'}, ["with checkpoint='x.pth', this one has checkpoint='y.pth': name"]),
        ({'weights': 'a', 'architecture': 'c'}, {'weights': 'b', 'architecture': 'd'}, ['with another architecture than this one: name']),
        ({'images_at_a_time': 2}, {'images_at_a_time': 3}, ['with batch_size=2, this one has batch_size=3: name']),
    ],
)  # fmt: skip
def test_other_settings_are_told_in_words_whose_brackets_and_quotes_close(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], said: list[str]
) -> None:
    write(tmp_path, record(0), settings={'methods': ['a'], **one})
    with pytest.raises(ValueError, match='holds an evaluation') as caught:
        read(tmp_path, settings={'methods': ['a'], **other})
    message = str(caught.value)
    assert [part for part in said if part not in message] == []
    assert len(message) < len(str(tmp_path)) + 300 and message.count("'") % 2 == 0
    for opened, closed in ('[]', '{}'):
        assert message.count(opened) == message.count(closed)
