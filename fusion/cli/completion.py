"""Prints the completion of commands, variants and flags for a shell:

    fusion completion bash > ~/.local/share/bash-completion/completions/fusion
    fusion completion zsh > ~/.zfunc/_fusion           # a folder of fpath
    fusion completion fish > ~/.config/fish/completions/fusion.fish

The script contains all words, so that completing starts no Python. Print it again after an update of Fusion.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from importlib import import_module

from fusion.cli.commands import COMMANDS, Command
from fusion.cli.variant import known_to
from fusion.command import guarded
from fusion.command.parser import command_parser
from fusion.errors import ExitCode
from fusion.terminal.spelling import program

SHELLS = ("bash", "zsh", "fish")
_FLAG = re.compile(r"^  (?:-\w, )?--(\[no-\])?([a-z][\w.-]*)", re.MULTILINE)


def words() -> dict[str, list[str]]:
    """What may follow each sequence of words: commands, variants or verbs, and flags.

    The key `train qwen_clip` stands for `fusion train qwen_clip`; the empty key for `fusion` alone.
    """
    found = {"": list(COMMANDS)}
    for command in COMMANDS.values():
        followers = known_to(command) if command.of_variant else list(command.verbs)
        found[command.name] = followers or _flags(command, [])
        for one in followers:
            found[f"{command.name} {one}"] = _flags(command, [one])
    return found | {"completion": list(SHELLS)}


def _flags(command: Command, path: Sequence[str]) -> list[str]:
    """The flags that `--help-all` of a command lists."""
    variant, verbs = (path[0], []) if command.of_variant else ("", list(path))
    try:
        module = import_module(command.module.format(variant=variant))
    except ImportError:  # an extra that is not installed: its command has no flags to complete
        return ["--help"]
    with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
        module.main([*verbs, "--help-all"])
    flags = [name for no, flag in _FLAG.findall(text.getvalue()) for name in _spellings(flag, is_switch=bool(no))]
    return [*flags, "--help", "--help-all"]


def _spellings(flag: str, *, is_switch: bool) -> list[str]:
    return [f"--{flag}", f"--no-{flag}"] if is_switch else [f"--{flag}"]


_BASH = """\
# Completion of fusion for bash; printed by `fusion completion bash`.
_fusion() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} at="" word
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "${{at:+$at }}$word" in
{keys}      *) ;;
    esac
  done
  local words=""
  case "$at" in
{cases}  esac
  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
}}
complete -o default -F _fusion fusion
"""
_ZSH = """\
#compdef fusion
# Completion of fusion for zsh; printed by `fusion completion zsh`.
local at="" word
for word in "${{(@)words[2,CURRENT-1]}}"; do
  case "${{at:+$at }}$word" in
{keys}    *) ;;
  esac
done
local -a found
case "$at" in
{cases}esac
compadd -- $found || _files
"""
_FISH_CONDITION = "__fish_seen_subcommand_from"


def bash(table: dict[str, list[str]]) -> str:
    """The script for bash 4 or later, from the table of `words`."""
    keys = "".join(f'      "{key}") at="{key}" ;;\n' for key in table if key)
    cases = "".join(f'    "{key}") words="{" ".join(found)}" ;;\n' for key, found in table.items())
    return _BASH.format(keys=keys, cases=cases)


def zsh(table: dict[str, list[str]]) -> str:
    """The script for zsh, from the table of `words`."""
    keys = "".join(f'    "{key}") at="{key}" ;;\n' for key in table if key)
    cases = "".join(f'  "{key}") found=({" ".join(found)}) ;;\n' for key, found in table.items())
    return _ZSH.format(keys=keys, cases=cases)


def fish(table: dict[str, list[str]]) -> str:
    """The script for fish, from the table of `words`."""
    lines = ["# Completion of fusion for fish; printed by `fusion completion fish`."]
    for key, found in table.items():
        conditions = [f"{_FISH_CONDITION} {word}" for word in key.split()] or ["__fish_use_subcommand"]
        names = [word for word in found if not word.startswith("--")]
        if names:
            others = "" if not key else f"; and not {_FISH_CONDITION} {' '.join(names)}"
            lines.append(f"complete -c fusion -f -n '{'; and '.join(conditions)}{others}' -a '{' '.join(names)}'")
        flags = [word.removeprefix("--") for word in found if word.startswith("--")]
        lines += [f"complete -c fusion -n '{'; and '.join(conditions)}' -l {flag}" for flag in flags]
    return "\n".join(lines) + "\n"


def _job(argv: Sequence[str] | None) -> ExitCode:
    parser = command_parser(f"{program()} completion", __doc__, "bash")
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")
    shell = parser.parse_args(argv).shell
    print({"bash": bash, "zsh": zsh, "fish": fish}[shell](words()), end="")
    return ExitCode.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code. `--help` raises SystemExit, as in argparse."""
    return guarded(lambda: _job(argv))
