"""What `pull.py runs` and `compare` say of runs that are written here, without a training."""

from __future__ import annotations

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from fusion import storage
from fusion.errors import DataError
from jobs.pull import main
from tests.conftest import Done
from tests.made_runs import make_run

HOSTILE = "no column [price] in \x1b[2Jtrain.csv \u202etxt [/b]"


def pull(*arguments: str) -> Done:
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main(arguments)
    return Done(code, out.getvalue(), err.getvalue())


def test_text_of_a_bucket_is_shown_and_does_nothing_else(tmp_path: Path) -> None:
    make_run(str(tmp_path), "bad", smapes=(), code=65, error=HOSTILE)
    make_run(str(tmp_path), "good", variant="[red]\x1b]0;title\x07")
    done = pull("runs", "--output", str(tmp_path))
    assert done.code == 0, done.err
    assert all(letter.isprintable() for line in done.out.splitlines() for letter in line)
    assert r"[red]\x1b]0;title\x07" in done.out


def test_errors_write_control_characters_out() -> None:
    error = DataError(HOSTILE, "a\nb\x1b")
    assert error.report().splitlines()[0] == r"error: no column [price] in \x1b[2Jtrain.csv \u202etxt [/b]"
    assert error.remedy == r"a b\x1b"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b"\xff\xfe"),
        ("config.json", b'"text"'),
        ("metrics/groups.csv", b"by,group,smape\nprice,0-5,\xff\n"),
        ("metrics/groups.csv", b"by,group,smape\nprice,0-5,many\n"),
        ("metrics/groups.csv", b"by,smape\nprice,5\n"),
        ("metrics/groups.csv", b"by,group,smape\nprice\n"),
        ("metrics/groups.csv", b'by,group,smape\n"price,0-5,5\n'),
        ("metrics/groups.csv", b""),
    ],
)
def test_compare_names_a_damaged_file(name: str, content: bytes, tmp_path: Path) -> None:
    for run in ("a", "b"):
        make_run(str(tmp_path), run)
    url = f"{tmp_path}/runs/b/{name}"
    storage.write(url, content)
    done = pull("compare", "a", "b", "--output", str(tmp_path))
    assert (done.code, done.err.splitlines()[0].startswith(f"error: {url} is damaged: ")) == (65, True), done.err


def test_compare_shows_text_as_it_is(tmp_path: Path) -> None:
    for run, column in (("a", "[price]"), ("b", "\x1b[2J")):
        storage.write(f"{make_run(str(tmp_path), run)}/config.json", storage.as_json({"text_column": column}))
        rows = f"by,group,smape\n[b]brand,{HOSTILE},5\n".encode()
        storage.write(f"{tmp_path}/runs/{run}/metrics/groups.csv", rows)
    done = pull("compare", "a", "b", "--output", str(tmp_path))
    assert done.code == 0 and "[price]" in done.out and r"\x1b[2J" in done.out and "[b]brand" in done.out
    assert all(letter.isprintable() for line in done.out.splitlines() for letter in line)
    assert json.loads(pull("compare", "a", "b", "--output", str(tmp_path), "--json").out)["runs"] == ["a", "b"]
