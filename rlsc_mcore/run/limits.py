"""Raise the process limits that a run needs. Imports no torch."""

import contextlib
import resource

from rlsc_mcore.config import ConfigError

OPEN_FILES_NEEDED = 256  # measured: 137 for a single rank; more groups and ranks need more
OPEN_FILES_WANTED = 65536


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard limit, at most 65536.

    Raises `ConfigError` if the limit is then below the 256 files that a run needs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES_NEEDED:
        raise ConfigError(
            f"ulimit -n: {soft} open files are too few, expected at least {OPEN_FILES_NEEDED}: raise the "
            "hard limit"
        )
