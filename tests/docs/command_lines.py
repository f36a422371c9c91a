"""Finds the commands of Fusion in blocks of shell, and checks each with its own parser."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from docs.tools.parsers import accepts
from fusion.cli.commands import COMMANDS
from tests.docs.blocks import ROOT

OPERATORS = set("();<>|&\n")
COMMENT = re.compile(r"(^|[ \t])#[ !].*$", re.MULTILINE)
WORDS_OF_SHELL = {"do", "done", "then", "else", "fi", "if", "!", "time", "exec", "export"}
ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)
JOBS = {"submit": "submit", "pull": "pull", "doctor": "doctor", "control": "jobs"}


def wrong_commands(text: str) -> list[str]:
    """The commands of Fusion in a block of shell that their parsers refuse."""
    return [shlex.join(words) for words in commands(text) if not _is_right(words)]


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a block, as lists of words, with the variables that the block sets filled in."""
    variables: dict[str, str] = {}
    for words in _simple_commands(COMMENT.sub("", text.replace("\\\n", " "))):
        yield from _without_prefix(words, variables)


def _simple_commands(text: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars="".join(OPERATORS))
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t", "", True
    words: list[str] = []
    for word in lexer:
        if set(word) <= OPERATORS and word:
            yield words
            words = []
        else:
            words.append(word)
    yield words


def _without_prefix(words: Sequence[str], variables: dict[str, str]) -> Iterator[list[str]]:
    left = [filled for word in words for filled in _filled(word, variables)]
    if left[:1] == ["for"]:  # the loop is checked for its first value
        variables[left[1]] = left[3]
        return
    while left and (left[0] in WORDS_OF_SHELL or ASSIGNMENT.fullmatch(left[0])):
        if assigned := ASSIGNMENT.fullmatch(left[0]):
            variables[assigned[1]] = assigned[2]
        left = left[1:]
    if left:
        yield left


def _filled(word: str, variables: Mapping[str, str]) -> list[str]:
    value = re.sub(r"\$(\w+)", lambda found: variables.get(found[1], found[0]), word)
    return value.split() if word.startswith("$") else [value]


def _is_right(words: list[str]) -> bool:
    program, *rest = words
    name = Path(program).name
    if name == "fusion":
        return _subcommand(rest)
    if name == "torchrun":
        return _module(rest[rest.index("-m") + 1 :])
    if name not in ("python", "python3") or not rest:
        return True
    if rest[0] == "-m":
        return _module(rest[1:])
    script = re.fullmatch(r"jobs/(\w+)\.py", rest[0])
    if script and script[1] in JOBS:
        return _subcommand([JOBS[script[1]], *rest[1:]])
    return not rest[0].endswith(".py") or (ROOT / rest[0]).exists()


def _module(words: list[str]) -> bool:
    module, *rest = words
    if module.startswith("fusion.launch"):
        return _subcommand(["launch", *rest])
    if module.startswith("fusion."):
        found = find_spec(module)
        is_package = found is not None and found.submodule_search_locations is not None
        return accepts(f"{module}.__main__" if is_package else module, rest)
    return not module.startswith(("benchmarks", "tests")) or find_spec(module) is not None


def _subcommand(words: list[str]) -> bool:
    name, *rest = words
    if name not in COMMANDS:
        return name in ("--help", "--version")
    command = COMMANDS[name]
    if command.of_variant:
        if not rest or rest[0].startswith("-"):  # the variant of the only run
            rest = ["all_embeddings", *rest]
        return accepts(command.module.format(variant=rest[0]), rest[1:])
    own, of_job = _divided(name, rest)
    return accepts(command.module, own) and (not of_job or _is_right(of_job))


def _divided(name: str, words: list[str]) -> tuple[list[str], list[str]]:
    """The arguments of `submit` and `launch` themselves, and the command that they start."""
    if name == "submit" and "--" in words:
        own, flags = words[: words.index("--")], words[words.index("--") + 1 :]
        task = own[own.index("--task") + 1] if "--task" in own else "train"
        variant = own[own.index("--variant") + 1] if "--variant" in own else "all_embeddings"
        return own, ["fusion", task, variant, *flags]
    if name == "launch":
        for at, word in enumerate(words):
            if word == "train" or word.startswith("fusion."):
                return words, ["fusion", *words[at:]] if word == "train" else ["python", "-m", *words[at:]]
    return words, []
