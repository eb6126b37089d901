"""Upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from fedpet.errors import InputError, RunError

__all__ = ["push_to_hub"]


def push_to_hub(folder: str | Path, name: str, *, private: bool = True) -> str:
    """Make a model's repository, where it is absent, and upload a folder to it.

    Args:
        folder: As `export_run` or `export_peft` wrote it.
        name: "organisation/model", or "model" for the token's owner.
        private: Whether a repository that is made now is private; one that is there stays as it is.

    Returns:
        Its address.

    Raises:
        InputError: There is no such folder.
        RunError: The hub is out of reach or refuses, or there is no token.
    """
    from huggingface_hub import HfApi, constants, get_token

    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r} to upload to {name!r}.")
    if constants.HF_HUB_OFFLINE:
        raise _not_uploaded(folder, name, "HF_HUB_OFFLINE is set: unset it")
    if get_token() is None:
        raise _not_uploaded(folder, name, "there is no token: run `hf auth login`, or set HF_TOKEN")
    hub = HfApi()
    try:
        made = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message="Upload a model trained by fedpet",
            ignore_patterns=[".*"],  # locks
        )
    except Exception as error:  # the hub's client raises a dozen kinds, of four libraries
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise _not_uploaded(folder, name, reason.rstrip(".")) from None
    return str(made)


def _not_uploaded(folder: Path, name: str, reason: str) -> RunError:
    return RunError(f"{str(folder)!r} was not uploaded to {name!r}: {reason}.")
