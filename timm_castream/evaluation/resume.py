"""The folder of an evaluation: values of finished batches, from which an interrupted evaluation resumes.

`settings.json` has the settings. `finished.{rank}.jsonl` has the values of one batch a line, one file a process. A lock
keeps other runs out; the operating system releases it when the process ends, however it ends.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .._utils.files import make_folder, write_whole
from .values import ImageValues

SETTINGS = 'settings.json'
_MAX_VALUE_CHARS = 60  # characters of one value in an error

# What has no value that a person could read, in words.
_WORDS = {
    'images': 'other images (their names, sizes or times)',
    'transform': 'another transform',
    'weights': 'other weights',
    'architecture': 'another architecture',
}
_KEYWORDS = {'images_at_a_time': 'batch_size'}
# What follows from the others.
_MODEL = ('model', 'model_kwargs', 'num_classes')
_FOLLOWS = {
    'weights': (*_MODEL, 'checkpoint', 'pretrained', 'use_ema', 'architecture'),
    'architecture': _MODEL,
    'transform': ('input_size', 'img_size', 'crop_pct', 'crop_mode', 'mean', 'std', 'loader_normalisation'),
    'loader_normalisation': ('mean', 'std'),
    'input_size': ('img_size',),
    'images_at_a_time': ('user_methods',),
    'user_methods': ('methods',),
}


class Journal:
    """Values of finished batches in a folder.

    Args:
        folder: Made where it is missing.
        rank: Rank of the process.

    Raises:
        ValueError: If `folder` is a file.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = make_folder(folder)
        self.path = folder / f'finished.{rank}.jsonl'
        self.temperatures_path = folder / 'temperatures.json'
        self._lock = FileLock(folder / '.lock', timeout=0)

    def lock(self) -> None:
        """Keeps other runs out until `close`. The first process of a run calls it.

        Raises:
            ValueError: If another run writes to the folder.
        """
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f'Another evaluation is writing to {self.folder}: wait for its end, or name another folder.'
            ) from None

    def close(self) -> None:
        """Releases the lock."""
        self._lock.release()

    def resume(self, settings: Mapping[str, Any]) -> ImageValues:
        """Values of the finished images, each image once.

        Args:
            settings: Settings of this run, plain data.

        Raises:
            ValueError: If the folder holds an evaluation with other settings, or a file is damaged.
        """
        lines = _lines(self.folder)
        if lines:
            check_settings(self.folder, settings)
        else:
            self.temperatures_path.unlink(missing_ok=True)  # of an evaluation that finished no batch
            with write_whole(self.folder / SETTINGS) as file:
                json.dump(settings, file, indent=2)
        parts: list[ImageValues] = []
        seen: set[int] = set()
        for path, number, line in lines:
            values = _parse(path, number, line)
            if values is not None:
                parts.append(values.without(seen))
                seen |= set(values.images['image'].tolist())
        return ImageValues.concatenate(parts)

    def append(self, values: ImageValues) -> None:
        """Adds the values of a finished batch."""
        # The line break in front ends a line that a kill cut off.
        with open(self.path, 'ab') as file:
            file.write(b'\n' + json.dumps(values.to_json()).encode() + b'\n')


def is_finished(folder: str | Path | None, indices: Collection[int]) -> bool:
    """Whether a folder holds the values of all images, whatever its settings."""
    if folder is None:
        return False
    found: set[int] = set()
    try:
        for line in _lines(Path(folder)):
            values = _parse(*line)
            found |= set() if values is None else set(values.images['image'].tolist())
    except ValueError:  # a damaged line, which `Journal` reports
        return False
    return found >= set(indices)


def check_settings(folder: str | Path, settings: Mapping[str, Any], but: Collection[str] = ()) -> None:
    """Raises an error where a folder holds finished batches of another evaluation.

    Args:
        folder: Of an evaluation, or a place for one.
        settings: Of this run, plain data.
        but: Names of settings that are not known yet.

    Raises:
        ValueError: If the folder holds an evaluation with other settings, or its settings cannot be read.
    """
    folder = Path(folder)
    if not any(folder.glob('finished.*.jsonl')):
        return
    path = folder / SETTINGS
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(found, dict):
            raise ValueError
    except (OSError, ValueError):
        raise ValueError(
            f'{path} is missing or damaged, so the finished batches beside it cannot be used: delete '
            f'{folder}, or name another folder.'
        ) from None
    wanted = json.loads(json.dumps(settings))
    wrong = [
        key
        for key in sorted((found.keys() | wanted.keys()) - set(but))
        if found.get(key) != wanted.get(key) and (found.get(key) or wanted.get(key))
    ]
    if wrong == ['images']:
        raise ValueError(
            f'The images have changed since the evaluation in {folder} began (their names, sizes '
            'or times): name another folder.'
        )
    wrong = [key for key in wrong if not set(_FOLLOWS.get(key, ())) & set(wrong)]
    if wrong:
        words = [_WORDS[key] for key in wrong if key in _WORDS]
        if 'weights' in wrong and wanted.get('checkpoint'):
            words[words.index(_WORDS['weights'])] += f' ({wanted["checkpoint"]} has changed)'
        if 'user_methods' in wrong:
            before, now = (side.get('user_methods') or {} for side in (found, wanted))
            changed = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
            words.append(f'another function or other maps for {", ".join(map(repr, sorted(changed)))}')
        keys = [key for key in wrong if key not in _WORDS and key != 'user_methods']
        others = ' and '.join(words)
        if keys:
            others = f' and {others}' if others else ''
            difference = f'{_shown(found, keys)}, this one has {_shown(wanted, keys)}{others}'
        else:
            difference = f'{others} than this one'
        raise ValueError(f'{folder} holds an evaluation with {difference}: name another folder.')


def recorded_engine(folder: str | Path | None) -> str:
    """The engine of the finished batches in a folder, with its version, or '' where there are none."""
    if folder is None or not any(Path(folder).glob('finished.*.jsonl')):
        return ''
    try:
        return str(json.loads(Path(folder, SETTINGS).read_text(encoding='utf-8'))['engine'])
    except (OSError, ValueError, KeyError, TypeError):  # `check_settings` reports it
        return ''


def _lines(folder: Path) -> list[tuple[Path, int, bytes]]:
    """The finished batches of all processes: (file, number of the line, line)."""
    return [
        (path, number, line)
        for path in sorted(folder.glob('finished.*.jsonl'))
        for number, line in enumerate(path.read_bytes().splitlines(), start=1)
        if line.strip()
    ]


def _parse(path: Path, number: int, line: bytes) -> ImageValues | None:
    """The values of a line, or None for a line that a kill cut off."""
    try:
        record = json.loads(line)
    except ValueError:
        if line.startswith(b'{"'):
            return None
        record = None
    try:
        return ImageValues.from_json(record)
    except ValueError:
        raise ValueError(
            f'{path}, line {number}, is no record of this evaluation: delete that line, or name another folder.'
        ) from None


def _shown(settings: Mapping[str, Any], keys: list[str]) -> str:
    shown = [f'{_KEYWORDS.get(key, key)}={_value(settings.get(key))}' for key in keys[:3]]
    return ', '.join(shown) + (f' and {len(keys) - 3} more' if len(keys) > 3 else '')


def _value(value: Any) -> str:
    """The value in few characters. Quotes and brackets that open also close."""
    text = repr(value)
    if len(text) <= _MAX_VALUE_CHARS:
        return text
    if isinstance(value, str):
        return repr(f'{value[: _MAX_VALUE_CHARS - 3]}...')
    if not isinstance(value, (list, dict)):
        return f'{text[: _MAX_VALUE_CHARS - 3]}...'
    parts = (
        [f'{key!r}: {_value(v)}' for key, v in value.items()] if isinstance(value, dict) else list(map(_value, value))
    )
    kept = parts[:1]
    for part in parts[1:]:
        if len(', '.join([*kept, part])) > _MAX_VALUE_CHARS:
            kept.append('...')
            break
        kept.append(part)
    return f'{text[0]}{", ".join(kept)}{text[-1]}'
