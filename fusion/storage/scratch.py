"""The folder for temporary files."""

from __future__ import annotations

import tempfile

from fusion.errors import ConfigError


def temporary_folder() -> str:
    """The folder that `tempfile` uses: TMPDIR, or /tmp and similar.

    Raises:
        ConfigError: no such folder is writable.
    """
    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:  # for example in a container whose root is read-only
        remedy = "set TMPDIR to a writable folder, or mount one at /tmp (Kubernetes: an emptyDir)"
        raise ConfigError(f"no temporary folder is writable: {error.strerror}", remedy) from error
