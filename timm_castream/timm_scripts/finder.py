"""Find timm's train.py and validate.py, which timm's pip package does not contain.

The places, in this order: the path given; `TIMM_TRAIN_SCRIPT` or `TIMM_VALIDATE_SCRIPT`; the folder of an editable
install of timm; the user's cache; GitHub. An old script runs with a newer timm, but a newer script does not run with an
older timm. Therefore cache and GitHub are searched for releases that are not newer than the installed timm, and for
files whose SHA-256 is listed here. The SHA-256 is compared each time, before the file is run.
"""

from __future__ import annotations

import hashlib
import os
import re
import urllib.request
from http.client import HTTPException
from pathlib import Path

import timm

from .._utils.files import write_whole

# SHA-256 of the scripts by release, oldest first. The table ends at 1.0.28: its scripts were tried with timm 1.0.28 to
# 1.0.31, and a later script is listed after it was read and tried. Until then a later timm runs those of 1.0.28.
KNOWN_SHA256 = {
    '1.0.28': {
        'train.py': '1fb02d26fe16536bc7de2c987980644353117c2b2b8046532261464093cd1ac6',
        'validate.py': '1ff87867c808997ce443eb8ff8b2c7324519cdd0ec9dafbc3d5e666f89436749',
    }
}
URL_VARIABLE = 'TIMM_CASTREAM_SCRIPT_URL'
DEFAULT_URL = 'https://raw.githubusercontent.com/huggingface/pytorch-image-models'
_TIMEOUT = 30  # seconds without a byte
_MAX_BYTES = 2**20  # the scripts have about 80 kB


class ScriptNotFoundError(RuntimeError):
    """timm's script was not found. The message explains how to get it."""


def find_script(name: str, given: str | os.PathLike[str] | None = None) -> Path:
    """Finds one of timm's scripts, downloading it as the last resort.

    Args:
        name: `train.py` or `validate.py`.
        given: The script's path if the user named one. It is taken as it is, whatever its release.

    Returns:
        The absolute path of the script.

    Raises:
        ScriptNotFoundError: No script, or a path that the user named is no file.
    """
    variable = f'TIMM_{Path(name).stem.upper()}_SCRIPT'
    for source, path in (('--timm-script', given), (variable, os.environ.get(variable))):
        if path:
            if not Path(path).is_file():
                raise ScriptNotFoundError(f'{source} names {path}, which is not a file.')
            return Path(path).resolve()
    return _beside_timm(name) or _cached(name) or _download(name)


def script_release(path: Path) -> str:
    """The release of a script, for messages: by its SHA-256, or by the timm folder of its clone."""
    digest = _sha256(path.read_bytes())
    tags = [f'v{release}' for release, scripts in KNOWN_SHA256.items() if digest in scripts.values()]
    if tags:
        return tags[-1]
    version_file = path.parent / 'timm' / 'version.py'
    found = re.search(r"__version__ = '([^']+)'", version_file.read_text()) if version_file.is_file() else None
    return f'v{found[1]}' if found else 'an unknown release'


def cache_dir() -> Path:
    """The folder of downloaded scripts, with one folder for each release."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_castream' / 'scripts'


def _runnable_releases() -> list[str]:
    """Known releases whose scripts the installed timm can run, newest first."""
    installed = _numbers(timm.__version__)
    return [release for release in reversed(KNOWN_SHA256) if _numbers(release) <= installed]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r'\d+', version)[:3])


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _beside_timm(name: str) -> Path | None:
    root = Path(timm.__file__).resolve().parent.parent
    # site-packages has no pyproject.toml; a train.py there would be somebody else's.
    return root / name if (root / 'pyproject.toml').is_file() and (root / name).is_file() else None


def _cached(name: str) -> Path | None:
    for release in _runnable_releases():
        path = cache_dir() / release / name
        if path.is_file() and _sha256(path.read_bytes()) == KNOWN_SHA256[release][name]:
            return path
    return None


def _download(name: str) -> Path:
    releases = _runnable_releases()
    if not releases:
        raise ScriptNotFoundError(
            f'No known {name} runs with timm {timm.__version__}: pip install "timm>={next(iter(KNOWN_SHA256))}".'
        )
    release = releases[0]
    url = f'{os.environ.get(URL_VARIABLE, DEFAULT_URL).rstrip("/")}/v{release}/{name}'
    advice = (
        f"timm's pip package has no {name}: take it from a clone of timm at tag v{release} and name it with "
        f'--timm-script or TIMM_{Path(name).stem.upper()}_SCRIPT.'
    )
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            content = response.read(_MAX_BYTES)
    except (OSError, HTTPException, ValueError) as error:
        raise ScriptNotFoundError(f'{url} could not be downloaded ({error}). {advice}') from error
    if _sha256(content) != KNOWN_SHA256[release][name]:
        raise ScriptNotFoundError(f'{url} is not run: by its SHA-256 it is not the {name} of timm {release}. {advice}')
    path = cache_dir() / release / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(path, 'wb') as file:
            file.write(content)
    except OSError as error:
        raise ScriptNotFoundError(f'{name} cannot be kept ({error}): set XDG_CACHE_HOME to another folder.') from error
    return path
