"""Writes the image and the environment of `k8s/cluster.toml` into the files of `k8s/`, for `kubectl apply`.

    python jobs/manifests.py
    python jobs/manifests.py --check     # writes nothing; ends with 78 if a file differs from cluster.toml

The command changes only these lines; all else in the files, comments included, stays as it is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from fusion.command import guarded
from fusion.errors import ConfigError, ExitCode, Parser
from fusion.jobs.arguments import checkout
from fusion.jobs.schedulers.kubernetes_settings import Cluster, read

K8S = checkout() / "k8s"
CONFIG = "config.yaml"  # the file with the ConfigMap
# The files are changed as text and not as parsed YAML, which would lose their comments.
IMAGE = re.compile(r"^( *(?:- )?image: )\S+$", re.MULTILINE)
CONFIG_MAP = re.compile(r"(?<=^data:\n)(?:  .*\n)+", re.MULTILINE)
ENTRY = re.compile(r"^  (\w+): (.*?)(  #.*)?$")


def updated(text: str, name: str, cluster: Cluster) -> str:
    """The text of a file with the image of the cluster's settings, and in `config.yaml` with their environment.

    Args:
        name: the file's name.
    """
    text = IMAGE.sub(lambda found: found[1] + cluster.image, text)
    if name != CONFIG:
        return text
    return CONFIG_MAP.sub(lambda found: _environment(found[0], cluster.environment), text, count=1)


def _environment(block: str, environment: dict[str, str]) -> str:
    """The entries of the ConfigMap. Existing entries keep their place and their comment; new ones follow the last.

    Args:
        block: the lines of `data:` in the file.
    """
    lines, left = [], {name: value for name, value in environment.items() if value}  # empty variables are unset
    last = 0
    for line in block.splitlines():
        found = ENTRY.match(line)
        if found and found[1] in left:
            line = f"  {found[1]}: {_scalar(left.pop(found[1]))}{found[3] or ''}"
        elif found:
            continue
        lines.append(line)
        last = len(lines) if found else last
    lines[last:last] = [f"  {name}: {_scalar(value)}" for name, value in left.items()]
    return "\n".join(lines) + "\n"


def _scalar(text: str) -> str:
    """The text as a YAML scalar; in quotes where YAML would otherwise read something else, such as a number."""
    plain = "\n" not in text and ": " not in text and _read(text) == text
    return text if plain else str(yaml.safe_dump(text, default_style='"', width=sys.maxsize)).strip()


def _read(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def write(cluster: Cluster, folder: Path, *, check: bool) -> list[Path]:
    """Updates the files below a folder such as `k8s/`; returns those that differed.

    Args:
        check: write nothing.

    Raises:
        ConfigError: a file cannot be written.
    """
    changed = []
    for path in sorted(path for part in ("base", "overlays") for path in (folder / part).glob("**/*.yaml")):
        text = path.read_text()
        if (wanted := updated(text, path.name, cluster)) != text:
            changed.append(path)
            if not check:
                _write(path, wanted)
    return changed


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        hint = "make k8s/ writable, or give another --folder"
        raise ConfigError(f"cannot write {path}: {error.strerror}", hint) from error


def _parser() -> Parser:
    parser = Parser("python jobs/manifests.py", description=__doc__)
    parser.add_argument("--settings", type=Path, default=K8S / "cluster.toml", metavar="FILE",
        help="settings of the cluster (default: k8s/cluster.toml)")  # fmt: skip
    parser.add_argument("--folder", type=Path, default=K8S, metavar="FOLDER", help="folder with base/ and overlays/ "
        "(default: k8s/ of this checkout)")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="write nothing; end with 78 if a file differs")
    return parser


def _job(argv: Sequence[str] | None) -> ExitCode:
    given = _parser().parse_args(argv)
    changed = write(read(given.settings), given.folder, check=given.check)
    if changed and given.check:
        message = f"{len(changed)} files differ from {given.settings}: {', '.join(map(str, changed))}"
        raise ConfigError(message, "update them with `python jobs/manifests.py`")
    for path in changed:
        print(path)
    print(f"{len(changed) or 'no'} files changed")
    return ExitCode.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with `argv`; returns its exit code. `--help` raises SystemExit, as argparse does."""
    return guarded(lambda: _job(argv))


if __name__ == "__main__":
    sys.exit(main())
