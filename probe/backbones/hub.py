"""Checkpoints on the Hugging Face hub: the few files that a tower needs, of one commit."""

from pathlib import Path
from typing import Any

from probe.errors import InputError

_CONFIGS = ["config.json", "preprocessor_config.json", "processor_config.json"]
_SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
_MSGPACK = ["flax_model.msgpack"]
_TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"]


def fetch(repo_id: str, revision: str | None, *, with_tokenizer: bool = False) -> tuple[Path, str]:
    """Brings a checkpoint's config, preprocessing and weights into the local hub cache, where not there yet.

    Args:
      repo_id: owner/name.
      revision: branch, tag or commit hash (default: the main branch).
      with_tokenizer: bring the files of its tokenizer too.
    Returns: the folder in the cache, and the hash of the commit that it holds.
    Raises: InputError naming the id: unknown, private, offline and not in the cache, or without weights that
      can be read safely.
    """
    import huggingface_hub  # only here: a local folder needs no client

    def download(revision: str | None, patterns: list[str]) -> Path:
        return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=patterns))

    configs = _CONFIGS + (_TOKENIZER if with_tokenizer else [])
    try:
        folder = download(revision, configs + _SAFETENSORS)
        commit = folder.name
        if not _has(folder, _SAFETENSORS):
            folder = download(commit, configs + _MSGPACK)
    except Exception as err:  # of the client and the network libraries below it: they have no common ground
        raise InputError(f"{repo_id}: {_explain(err, revision, huggingface_hub)}") from err
    if not _has(folder, _SAFETENSORS + _MSGPACK):
        raise InputError(
            f"{repo_id} at {commit}: has neither safetensors nor {_MSGPACK[0]}. Pickled weights (.bin) are "
            "not read, because loading them can run any code. Look for a revision with safetensors (the "
            f"hub has a pull request with them for many models: {repo_id}@refs/pr/1), or save the model anew "
            "with transformers where you trust it, and give that folder."
        )
    return folder, commit


def _has(folder: Path, patterns: list[str]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _explain(err: Exception, revision: str | None, client: Any) -> str:
    folder_instead = "or give the folder of a copy in place of the id (the one that holds config.json)"
    if isinstance(err, client.errors.LocalEntryNotFoundError):
        return (
            f"it is not whole in the local hub cache ({client.constants.HF_HUB_CACHE}), and the hub cannot "
            f"be reached. Run this once with a connection and without HF_HUB_OFFLINE, {folder_instead}."
        )
    if isinstance(err, client.errors.RevisionNotFoundError):
        return f"the hub has no revision {revision!r} of it. Leave out the revision to get the main branch."
    if isinstance(err, client.errors.RepositoryNotFoundError):
        return (
            "the hub has no such model, or it is private or gated. Check the id (owner/name), set HF_TOKEN "
            f"if it needs a login, {folder_instead}."
        )
    return f"cannot be downloaded from the hub: {type(err).__name__}: {err}"
