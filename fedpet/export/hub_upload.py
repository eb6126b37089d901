"""Upload an exported folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from fedpet.errors import RunError

__all__ = ["push_to_hub"]

_PRIVATE_FILES = [".*"]  # locks


def push_to_hub(folder: str | Path, name: str, *, private: bool = True) -> str:
    """Make a model's repository, where it is absent, and upload a folder to it.

    Args:
        folder: As `export_run` or `export_peft` wrote it.
        name: "organisation/model", or "model" for the token's owner.
        private: Whether a repository that is made now is private; one that is there stays as it is.

    Returns:
        Its address.

    Raises:
        RunError: The hub is out of reach or refuses, or there is no token.
    """
    from huggingface_hub import HfApi, constants

    folder = Path(folder)
    if constants.HF_HUB_OFFLINE:
        raise _not_pushed(folder, name, "HF_HUB_OFFLINE is set: unset it")
    hub = HfApi()
    try:
        made = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message="Upload a model trained by fedpet",
            ignore_patterns=_PRIVATE_FILES,
        )
    except Exception as error:  # the hub's client raises a dozen kinds, of four libraries
        reason = " ".join(str(error).split())[:200]
        if not hub.token and constants.HF_TOKEN_PATH and _is_refusal(error):
            reason = "there is no token: `hf auth login` keeps one, or set HF_TOKEN"
        raise _not_pushed(folder, name, reason) from None
    return str(made)


def _is_refusal(error: Exception) -> bool:
    from huggingface_hub.errors import LocalTokenNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(error, LocalTokenNotFoundError) or status in (401, 403)


def _not_pushed(folder: Path, name: str, reason: str) -> RunError:
    return RunError(f"{str(folder)!r} was written, and not uploaded to {name!r}: {reason}.")
