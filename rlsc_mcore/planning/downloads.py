"""Tell what a run will download from the hub, how large it is, and where the cache is. Imports no torch."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from rlsc_mcore.config import Config, ConfigError
from rlsc_mcore.model.shape import HUB_FILES
from rlsc_mcore.planning.known_models import find_model, num_parameters

EMBEDDED = "embedded:"
_FILE_ENDS = (".jsonl", ".json", ".ndjson", ".txt", ".parquet", ".csv", ".tsv", ".gz", ".zip")
PUBLISHED_BYTES = 2  # per parameter: the known models are published in bfloat16
HUB_SECONDS = 5.0  # longest wait for the hub's answer


@dataclass(frozen=True)
class Download:
    """One hub repository that a run reads."""

    field: str
    kind: Literal["model", "dataset"]
    name: str

    def cached(self) -> Path | None:
        """Return the complete snapshot in the cache, or None."""
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(self.name, repo_type=self.kind, local_files_only=True))
        except Exception:  # never downloaded, or no valid hub name
            return None
        if self.kind == "model" and not any(folder.glob("*.safetensors")):
            return None
        return folder

    def fetch(self) -> Path:
        """Download what is not in the cache yet, and return the snapshot; raises `ConfigError`."""
        from huggingface_hub import snapshot_download

        patterns = list(HUB_FILES) if self.kind == "model" else None
        try:
            return Path(snapshot_download(self.name, repo_type=self.kind, allow_patterns=patterns))
        except Exception as error:  # offline, unknown name or no permission
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            what = "data set" if self.kind == "dataset" else "model"
            raise ConfigError(f"{self.field}: cannot download the {what} {self.name}: {reason}") from None

    def size(self) -> str:
        """Return the size as the hub states it, else an estimate for a known model."""
        from huggingface_hub import HfApi

        files = None
        if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
            try:
                api = HfApi()
                ask = api.model_info if self.kind == "model" else api.dataset_info
                files = ask(self.name, files_metadata=True, timeout=HUB_SECONDS).siblings
            except Exception:  # no network, no permission or no such name
                files = None
        if files is not None:
            sizes = [
                file.size or 0
                for file in files
                if self.kind == "dataset" or any(fnmatch(file.rfilename, each) for each in HUB_FILES)
            ]
            return describe_size(sum(sizes))
        if self.kind == "model":
            try:
                parameters = num_parameters(find_model(self.name))
            except ConfigError:
                return "size unknown: the hub did not answer"
            return f"about {describe_size(parameters * PUBLISHED_BYTES)}"
        return "size unknown: the hub did not answer"


def hub_names(config: Config) -> list[Download]:
    """Return the hub repositories that a configuration names, the model first."""
    named = [
        Download("model.path", "model", config.model.path),
        Download("data.path", "dataset", config.data.path),
    ]
    if config.evaluation.path is not None:
        named.append(Download("evaluation.path", "dataset", config.evaluation.path))
    found: dict[tuple[str, str], Download] = {}
    for download in named:
        is_local = Path(download.name).expanduser().exists() or download.name.startswith(EMBEDDED)
        if not is_local and is_hub_name(download.name):
            found.setdefault((download.kind, download.name), download)
    return list(found.values())


def is_hub_name(path: str) -> bool:
    """Return whether `path` has the form OWNER/NAME of a hub repository."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith(_FILE_ENDS)


def download_facts(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (name, value) facts: each download with its size, the cache, and how to prepare a cluster
    without network."""
    downloads = hub_names(config)
    if not downloads:
        yield "download", "nothing: model and questions are on this machine"
        return
    from huggingface_hub import constants

    is_missing = False
    for download in downloads:
        what = "data set" if download.kind == "dataset" else download.kind
        if download.cached() is not None:
            yield "download", f"{what} {download.name}: in the cache"
        else:
            is_missing = True
            yield "download", f"{what} {download.name}: {download.size()}"
    yield "cache", f"{constants.HF_HUB_CACHE} (HF_HOME moves it)"
    if is_missing:
        parts = [f"--{'data' if d.kind == 'dataset' else 'model'} {d.name}" for d in downloads]
        yield "no network", f"first on a login node: rlsc prepare {' '.join(parts)}"


def describe_size(size: int) -> str:
    """Format a number of bytes in MB or GB (powers of ten)."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
