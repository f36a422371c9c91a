"""How a user types a command: `fusion train qwen_clip`, `python -m fusion.qwen_clip.train`, or a script of `jobs/`.

Messages and help name commands as modules (`python -m fusion.compare`) and as scripts (`python jobs/pull.py`). What a
user sees passes through `as_typed`, which writes them as subcommands if the user has typed a subcommand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# Last part of a module of a variant -> subcommand.
OF_VARIANT = {"train": "train", "evaluate_by_groups": "evaluate", "predict_test": "predict"}
# Script of a checkout -> subcommand.
SCRIPTS = {"control": "jobs", "doctor": "doctor", "pull": "pull", "submit": "submit"}
_MODULE = re.compile(rf"python -m fusion\.(?:(\w+)\.({'|'.join(OF_VARIANT)})|([a-z]+))(?![\w.]\w)")
_SCRIPT = re.compile(rf"(?:python )?jobs/({'|'.join(SCRIPTS)})\.py")
_CHECKOUT = Path(__file__).parents[2]

_state = {"prefix": ""}  # how `fusion` was typed; empty if a module or a script was


@contextmanager
def subcommands(prefix: str) -> Iterator[None]:
    """Inside the block, commands are written as subcommands of `prefix`: `fusion` or `python -m fusion`."""
    before = _state["prefix"]
    _state["prefix"] = prefix
    try:
        yield
    finally:
        _state["prefix"] = before


def module_of(words: Sequence[str]) -> list[str]:
    """The module and its flags, for the words of a subcommand with a variant; other words as they are.

    >>> module_of(["train", "qwen_clip", "--epochs", "3"])
    ['fusion.qwen_clip.train', '--epochs', '3']
    """
    names = {subcommand: name for name, subcommand in OF_VARIANT.items()}
    if len(words) < 2 or words[0] not in names:
        return list(words)
    return [f"fusion.{words[1]}.{names[words[0]]}", *words[2:]]


def program() -> str:
    """What the user has typed before a subcommand, or can type: `fusion` or `python -m fusion`."""
    return _state["prefix"] or "fusion"


def as_typed(text: str) -> str:
    """The text with its commands written in the way that the user has typed this one.

    >>> with subcommands("fusion"):
    ...     as_typed("train one with `python -m fusion.qwen_clip.train`; `python jobs/pull.py runs` lists runs")
    'train one with `fusion train qwen_clip`; `fusion pull runs` lists runs'
    """
    prefix = _state["prefix"]
    if prefix:
        text = _MODULE.sub(lambda found: f"{prefix} {_subcommand(found)}", text)
    # An installed package has no scripts, so that only subcommands can be typed there.
    if prefix or not (_CHECKOUT / "jobs").is_dir():
        text = _SCRIPT.sub(lambda found: f"{program()} {SCRIPTS[found[1]]}", text)
    return text


def _subcommand(found: re.Match[str]) -> str:
    variant, command, module = found.groups()
    return str(module) if module else f"{OF_VARIANT[command]} {variant}"
