"""Where temporary files go."""

from __future__ import annotations

import tempfile

from fusion.errors import ConfigError


def temporary_folder() -> str:
    """The folder that `tempfile` uses: TMPDIR, or /tmp and the like.

    Raises:
        ConfigError: none can be written.
    """
    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:  # as in a container whose root is read-only
        remedy = "set TMPDIR to a writable folder, or mount one at /tmp (Kubernetes: an emptyDir)"
        raise ConfigError(f"no temporary folder can be written: {error.strerror}", remedy) from error
