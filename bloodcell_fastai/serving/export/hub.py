"""Upload an export to the Hugging Face Hub."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ...errors import BloodcellError, UsageError


def check(repo_id: str, format: str) -> None:
    """Refuse what the Hub would refuse, before any work is done.

    Raises:
        BloodcellError: ``repo_id`` is not ``USER/NAME``, ``format`` is not ``timm``, or nobody is
            logged in.
    """
    if format != "timm":
        raise UsageError(f"`push_to_hub` does not take {format}.", "Use `format=timm`.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        repo_id = ""
    if repo_id.count("/") != 1:
        raise UsageError("`push_to_hub` names no repository.", "Give it as USER/NAME.")
    if not get_token():
        raise BloodcellError(
            "There is no Hugging Face token here.", "Log in: hf auth login, or set HF_TOKEN."
        )


def push(folder: Path, files: Sequence[str], repo_id: str) -> str:
    """Upload ``files`` and nothing else of ``folder``; the address of the repository.

    Raises:
        BloodcellError: the Hub cannot be reached or refuses.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=list(files),
            commit_message="Upload a model of bloodcell-fastai",
        )
    except Exception as error:  # the hub's client has changed its HTTP library, and its errors
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BloodcellError(
            f"The Hugging Face Hub did not take {repo_id}: {reason}",
            f"Check the network and the token (hf auth whoami), and try again; the files in "
            f"{folder} are complete.",
        ) from error
    return str(url)
