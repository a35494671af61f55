"""push_to_hub: what save_pretrained writes, as one commit in a repository of the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tfgptj.checkpoints.directory import DOCUMENTS, FORMATS, HEADS, TOKENIZER_FILES
from tfgptj.checkpoints.repository import hub_errors
from tfgptj.errors import CheckpointError


def push_to_hub(
    source: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **save_options: Any,
) -> Any:
    """Save a model, a tokenizer or a configuration, and upload it.

    All files come in one commit, so nobody finds a part of them. A checkpoint or a tokenizer that the repository has
    is replaced, as `save_pretrained` replaces it in a directory; other files are left alone. While that lasts, the
    files lie in a temporary directory too.

    Args:
        source: what has a `save_pretrained`.
        repo_id: id of the repository on the Hub, owner/name; made if there is none.
        commit_message: the commit's title.
        private: whether a new repository is private; None is the owner's default.
        token: Hub token with the permission to write; None or True for the stored one.
        revision: branch to commit to, made if there is none; None is the main branch.
        create_pr: open a pull request instead of committing to the branch.
        **save_options: arguments of `save_pretrained`; a model's are `format`, `max_shard_size` and `dtype`.

    Returns:
        The `huggingface_hub.CommitInfo`: a string with the commit's address, and with `oid` and `pr_url`.

    Raises:
        CheckpointError: if it cannot be saved or uploaded.
    """
    if not isinstance(repo_id, str):
        raise CheckpointError(f"repo_id must be a string of the form owner/name, got {repo_id!r:.200}")
    message = commit_message or f"Upload {type(source).__name__}"
    with hub_errors(repo_id, revision), tempfile.TemporaryDirectory(prefix="tfgptj-") as directory:
        source.save_pretrained(directory, **save_options)
        return _upload(Path(directory), repo_id, message, private, token, revision, create_pr)


def _upload(
    directory: Path,
    repository: str,
    message: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
) -> Any:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi  # slow to import

    hub = HfApi(token=token)
    repository = hub.create_repo(repository, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/") and not create_pr:
        hub.create_branch(repository, branch=revision, exist_ok=True)
    written = {path.name: path for path in sorted(directory.iterdir())}
    present = hub.list_repo_files(repository, revision=revision)
    # The library's upload_folder may make several commits: a load in between would mix old files with new ones.
    return hub.create_commit(
        repository,
        [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in written.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in superseded(present, set(written))),
        ],
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
    )


def superseded(present: Iterable[str], written: set[str]) -> list[str]:
    """The files of an older checkpoint or tokenizer that a new one, written beside it, has not.

    >>> superseded(["README.md", "tf_model.h5", "config.json"], {"config.json", "model.safetensors"})
    ['tf_model.h5']
    """
    names: set[str] = set()
    if written & set(HEADS):
        names |= {*HEADS, *DOCUMENTS}
        names |= {name for name in present if any(form.is_shard(name) for form in FORMATS.values())}
    if written & set(TOKENIZER_FILES):
        names |= set(TOKENIZER_FILES)
    return sorted(name for name in present if name in names and name not in written)
