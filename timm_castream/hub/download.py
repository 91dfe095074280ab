"""Download files of the Hugging Face Hub by its client, and compare them with the hash that the Hub gave."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from pathlib import Path

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WEIGHTS_NAME = 'model.safetensors'
PICKLE_NAME = 'pytorch_model.bin'
NO_PICKLE = (
    'Pickled weights are read only where a call asks for them by name, pretrained_cfg_overlay='
    f"dict(hf_hub_filename='{PICKLE_NAME}')."
)

_logger = logging.getLogger(__name__)


def download(repo_id: str, filename: str = WEIGHTS_NAME, cache_dir: str | Path | None = None) -> Path:
    """Downloads a file from the Hub, or finds it in the cache, and compares it with the SHA-256 that the Hub gave.

    The client compares sizes alone (huggingface_hub 2.4, plain HTTP), so one wrong bit would load without an error. A
    damaged file is removed from the cache and downloaded once more. A cache without symbolic links, as on some Windows
    machines, does not keep the SHA-256, and is not checked. A process reads each file once for this.

    Args:
        repo_id: `org/name` or `org/name@revision`.
        filename: Name of the file in the repository.
        cache_dir: Other than the client's own cache.

    Returns:
        Path of the file in the cache.

    Raises:
        ValueError: If `repo_id` is no name of a repository.
        RuntimeError: If the repository or the file is not there, or needs permission.
        OSError: If the Hub cannot be reached and the file is not in the cache, or it arrives damaged twice.
    """
    path = _fetch(repo_id, filename, cache_dir)
    if not _is_intact(path):
        _logger.warning(f'{filename} of {repo_id} is damaged in the cache, downloading it again.')
        _discard(path)
        path = _fetch(repo_id, filename, cache_dir, force_download=True)
        if not _is_intact(path):
            _discard(path)
            raise OSError(
                f'{filename} of {repo_id} arrives damaged: its SHA-256 is not what the Hub says. Nothing was '
                'kept; try again later or from another network.'
            )
    return path


def read_architecture(repo_id: str, cache_dir: str | Path | None = None) -> str:
    """Reads the registered name from a repository's config.json, for a clear error before timm reads that file.

    Args:
        repo_id: `org/name` or `org/name@revision`.
        cache_dir: Other than the Hub client's own cache.

    Raises:
        ValueError, RuntimeError, OSError: As `download`, or if config.json names no registered model.
    """
    path = download(repo_id, 'config.json', cache_dir)
    try:
        architecture = json.loads(path.read_text(encoding='utf-8'))['architecture']
    except (KeyError, TypeError, ValueError):
        raise ValueError(f'config.json of {repo_id} names no architecture, so timm cannot load it.') from None
    if not timm.is_model(architecture):
        raise ValueError(f'config.json of {repo_id} names the architecture {architecture!r}, which is not registered.')
    return architecture


def _fetch(repo_id: str, filename: str, cache_dir: str | Path | None, force_download: bool = False) -> Path:
    name, _, revision = repo_id.partition('@')
    try:
        return Path(
            hf_hub_download(
                name,
                filename,
                revision=revision or None,
                cache_dir=cache_dir,
                force_download=force_download,
                library_name='timm_castream',
            )
        )
    except Exception as error:  # the errors of the client's HTTP library change with its release
        raise hub_error(error, repo_id, filename) from error


def hub_error(error: Exception, repo_id: str, filename: str = WEIGHTS_NAME) -> Exception:
    """Translates a failed request to the Hub into one sentence that says what to do.

    Args:
        error: As huggingface_hub raised it.
        repo_id: The repository.
        filename: The file that was requested.

    Returns:
        The exception to raise: a ValueError, RuntimeError or OSError.
    """
    if isinstance(error, HFValidationError):
        return ValueError(f'{repo_id!r} is no name of a Hub repository, which is org/name.')
    if isinstance(error, GatedRepoError):
        return RuntimeError(f'{repo_id} asks for permission: accept its terms on the Hub, then run `hf auth login`.')
    if isinstance(error, RepositoryNotFoundError):
        return RuntimeError(f'{repo_id} is not on the Hub, or is private: check the name, or run `hf auth login`.')
    if isinstance(error, RevisionNotFoundError):
        return RuntimeError(f'{repo_id} has no such revision on the Hub: name a branch, tag or commit after the @.')
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return RuntimeError(f'{repo_id} has no {filename}.' + (f' {NO_PICKLE}' if filename == WEIGHTS_NAME else ''))
    cause = error.__cause__ or error
    if isinstance(cause, OfflineModeIsEnabled):
        return OSError(f'{filename} of {repo_id} is not in the cache and offline mode is on: unset HF_HUB_OFFLINE.')
    reason = ' '.join(str(cause).split()).rstrip('.') or type(cause).__name__
    return OSError(
        f'{filename} of {repo_id} is not in the cache and could not be downloaded: {reason}. Check the '
        'connection and try again.'
    )


def _blob(path: Path) -> Path:
    """The file that a file of the cache links to. The cache names it by the hash of its content, as the guide says:

    https://huggingface.co/docs/huggingface_hub/guides/manage-cache. A cache without links keeps the content itself.
    """
    return path.parent / os.readlink(path) if path.is_symlink() else path


def _is_intact(path: Path) -> bool:
    blob = _blob(path)
    if len(blob.name) != 64:  # 64 digits are the SHA-256 of a large file
        return True
    state = blob.stat()
    return _sha256(blob, state.st_size, state.st_mtime_ns) == blob.name


@functools.lru_cache
def _sha256(path: Path, size: int, modified: int) -> str:
    """The hash of a file, computed once in a process while size and time of the file stay the same."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _discard(path: Path) -> None:
    _blob(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
