"""Upload a model folder to the Hugging Face hub, for `rlsc export --push`.

The token is that of the package huggingface_hub: HF_TOKEN, or what `hf auth login` saved.
"""

from pathlib import Path

from rlsc_mcore.config import ConfigError, RunError
from rlsc_mcore.observability.console import Reporter
from rlsc_mcore.planning.downloads import is_hub_name
from rlsc_mcore.run.made_here import files_made


def check_push(name: str) -> None:
    """Raise `ConfigError` unless `name` is OWNER/NAME, the hub may be used, and there is a token.

    Uses no network.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
        is_valid = is_hub_name(name)
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise ConfigError(f"--push: expected OWNER/NAME of a hub repository, got {name!r}")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"--push {name}: HF_HUB_OFFLINE is set; unset it, or export without --push and upload later"
        )
    if get_token() is None:
        raise ConfigError(
            f"--push {name}: no token of the Hugging Face hub; set HF_TOKEN to a token with write permission, "
            "or run `hf auth login`"
        )


def make_repository(name: str) -> None:
    """Create the model repository `name` on the hub if it is not there; a new one is private.

    Raises `ConfigError` if the hub cannot be reached or refuses the token.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, repo_type="model", private=True, exist_ok=True)
    except Exception as error:  # no network, a token without permission, a name that is taken
        raise ConfigError(
            f"--push {name}: the hub does not make the repository: {_reason(error)}; check the network and "
            "whether the token may write there"
        ) from None


def push(folder: Path, name: str, message: str) -> str:
    """Upload the files that this program wrote into `folder` as one commit; return the commit's address.

    Raises `RunError` with the command that uploads the folder later.
    """
    from huggingface_hub import HfApi

    try:
        with Reporter(enabled=True).bar(f"uploading to {name}"):
            commit = HfApi().upload_folder(
                repo_id=name, folder_path=folder, commit_message=message, allow_patterns=files_made(folder)
            )
    except Exception as error:
        raise RunError(
            f"--push {name}: {_reason(error)}; {folder} is written, upload it later: hf upload {name} {folder}"
        ) from None
    return str(commit.commit_url)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith("For more information")]
    return " ".join(lines)[:300] or type(error).__name__
