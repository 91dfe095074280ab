"""Files written whole or not at all."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from timm_castream._utils.files import write_whole


@pytest.mark.parametrize(('mode', 'content'), [('w', 'größe\r\n'), ('wb', b'\x00\xff')])
def test_a_file_gets_its_name_when_it_is_complete(tmp_path, mode, content):
    path = tmp_path / 'a'
    with write_whole(path, mode) as file:
        file.write(content)
        assert not path.exists()
    assert path.read_bytes() == (content if mode == 'wb' else content.encode('utf-8'))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path, error):
    path = tmp_path / 'a'
    path.write_text('old')
    with pytest.raises(error), write_whole(path) as file:
        file.write('half')
        raise error
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r'no folder .*nowhere to write a\.txt'),
        write_whole(tmp_path / 'nowhere' / 'a.txt'),
    ):
        pass


def test_a_name_as_long_as_the_file_system_allows_is_written(tmp_path):
    path = tmp_path / ('n' * 255)
    with write_whole(path) as file:
        file.write('x')
    assert path.read_text() == 'x'


def test_threads_that_write_one_path_each_write_all_of_it(tmp_path):
    path = tmp_path / 'a'

    def write(letter: str) -> None:
        with write_whole(path) as file:
            for _ in range(1000):
                file.write(letter)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, 'abcdefgh'))
    assert path.read_text() in {letter * 1000 for letter in 'abcdefgh'}
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_has_the_permissions_that_open_gives(tmp_path):
    (tmp_path / 'plain').touch()
    with write_whole(tmp_path / 'whole'):
        pass
    assert os.stat(tmp_path / 'whole').st_mode == os.stat(tmp_path / 'plain').st_mode


def test_a_full_disk_is_named_by_the_file_that_does_not_fit(tmp_path):
    with pytest.raises(OSError, match=r'a\.bin') as error, write_whole(tmp_path / 'a.bin', 'wb'):
        raise OSError(errno.ENOSPC, 'No space left on device')
    assert error.value.filename == str(tmp_path / 'a.bin')
