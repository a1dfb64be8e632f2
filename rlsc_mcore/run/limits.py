"""Limits of the process that a run needs raised. Imports no torch."""

import contextlib
import resource

from rlsc_mcore.config import ConfigError

OPEN_FILES_NEEDED = 256  # a single rank has been seen with 137; more groups and ranks need more
OPEN_FILES_WANTED = 65536


def raise_file_limit() -> None:
    """Raise the soft limit of open files to what the hard limit allows; raises `ConfigError` where that is
    too little for a run."""
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
