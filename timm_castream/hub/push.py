"""Publish a model, or its stream alone, as a repository of the Hugging Face Hub."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from torch import nn

from .download import hub_error
from .repository import write_repository


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    stream_only: bool = False,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = 'Add model',
    **card: Any,
) -> str:
    """Publishes a model, or its stream alone, as a Hub repository: config.json, model.safetensors and a model card.

    Args:
        model: A model with a stream.
        repo_id: `org/name`. A repository that does not exist is made. An existing card is replaced.
        stream_only: Leave the backbone out.
        private: Whether a repository made here is private.
        token: Access token; None: the one of `hf auth login`.
        commit_message: Title of the commit.
        **card: More arguments of `publish.write_repository`.

    Returns:
        The repository's address.

    Raises:
        ValueError: If `repo_id` is no such name, or as `publish.write_repository`. Nothing is sent then.
        RuntimeError: If the Hub refuses the upload.
        OSError: If the Hub cannot be reached.
    """
    if repo_id.count('/') != 1:  # the client would take the user's own account, and the card could not name it
        raise ValueError(f'{repo_id!r} is no name of a Hub repository, which is org/name.')
    api = HfApi(token=token, library_name='timm_castream')
    with TemporaryDirectory() as folder:
        write_repository(model, folder, repo_id, stream_only, **card)
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=commit_message)
        except Exception as error:  # as in download
            raise _push_error(error, repo_id) from error
    return str(url)


def _push_error(error: Exception, repo_id: str) -> Exception:
    if isinstance(error, HFValidationError):
        return hub_error(error, repo_id)
    if getattr(getattr(error, 'response', None), 'status_code', None) in (401, 403):
        return RuntimeError(f'The Hub does not let you write {repo_id}: run `hf auth login` with a token that may.')
    return OSError(f'{repo_id} could not be published: {" ".join(str(error).split())}')
