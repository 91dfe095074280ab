"""Files of the Hugging Face Hub, through its client, checked against the hash that the Hub gave."""
from __future__ import annotations

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
NO_PICKLE = (
    'Pickled weights are read only where a call asks for them by name, pretrained_cfg_overlay='
    "dict(hf_hub_filename='pytorch_model.bin').")

_logger = logging.getLogger(__name__)


def download(repo_id: str, filename: str = WEIGHTS_NAME, cache_dir: str | Path | None = None) -> Path:
    """Downloads a file from the Hub, or finds it in the cache, and checks it against the SHA-256 that the Hub gave.

    The client itself compares sizes alone. A damaged file is removed from the cache and downloaded once more. (A cache
    without symbolic links, as on some Windows machines, does not keep the SHA-256, and is not checked.)

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
            raise OSError(f'{filename} of {repo_id} arrives damaged: its SHA-256 is not what the Hub says. Nothing was '
                          'kept; try again later or from another network.')
    return path


def read_architecture(repo_id: str, cache_dir: str | Path | None = None) -> str:
    """The registered name that a repository's config.json gives, for a clear error before timm reads that file.

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
        return Path(hf_hub_download(
            name, filename, revision=revision or None, cache_dir=cache_dir, force_download=force_download,
            library_name='timm_castream'))
    except Exception as error:  # the client's HTTP library has its own, which change with the release
        raise hub_error(error, repo_id, filename) from error


def hub_error(error: Exception, repo_id: str, filename: str = WEIGHTS_NAME) -> Exception:
    """What a failed request to the Hub means, in one sentence that says what to do.

    Args:
        error: As huggingface_hub raised it.
        repo_id: The repository that was asked.
        filename: The file that was asked for.

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
    return OSError(f'{filename} of {repo_id} is not in the cache and could not be downloaded: {reason}. Check the '
                   'connection and try again.')


def _blob(path: Path) -> Path | None:
    """The blob that a file of the cache links to, named by its etag. One step: it may itself link to a shared store."""
    return path.parent / os.readlink(path) if path.is_symlink() else None


def _is_intact(path: Path) -> bool:
    blob = _blob(path)
    if blob is None or len(blob.name) != 64:  # 64 digits: the SHA-256 of an LFS file
        return True
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == blob.name


def _discard(path: Path) -> None:
    blob = _blob(path)
    path.unlink(missing_ok=True)
    if blob is not None:
        blob.unlink(missing_ok=True)
