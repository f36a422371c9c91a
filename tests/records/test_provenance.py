"""The digest of the code changes if and only if code that computes prices changes."""

from __future__ import annotations

import ast
import io
import shutil
import tokenize
from pathlib import Path

import pytest

from fusion.records import provenance
from fusion.records.provenance import PACKAGE, code_digest, code_of


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "fusion"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "PACKAGE", copy)
    code_digest.cache_clear()
    yield copy  # type: ignore[misc]
    code_digest.cache_clear()


def after(path: Path, old: str, new: str, root: str = "prediction") -> bool:
    """Whether the digest is another once the text is replaced."""
    before, source = code_digest(root), path.read_text()
    assert old in source
    path.write_text(source.replace(old, new, 1))
    code_digest.cache_clear()
    return code_digest(root) != before


@pytest.mark.parametrize(
    "name", ["nn/neighbours.py", "prediction/predict.py", "data/embeddings.py", "data/tables.py", "qwen_clip/model.py"]
)
def test_code_that_decides_a_price_counts(package: Path, name: str) -> None:
    assert after(package / name, "\n\n\ndef ", "\n\n\nADDED = 1\n\n\ndef ")


@pytest.mark.parametrize("name", ["nn/layers.py", "nn/members.py", "nn/price_model.py"])
def test_classes_that_decide_a_price_count(package: Path, name: str) -> None:
    assert after(package / name, "\n\n\nclass ", "\n\n\nADDED = 1\n\n\nclass ")


@pytest.mark.parametrize(
    "name",
    [
        "demo/__main__.py",
        "convert/__main__.py",
        "verify/__main__.py",
        "launch/launcher.py",
        "training/loop.py",
        "evaluation/evaluate.py",
    ],
)
def test_other_commands_do_not_count(package: Path, name: str) -> None:
    assert not after(package / name, "\n\n\ndef ", "\n\n\nADDED = 1\n\n\ndef ")


def test_the_code_of_a_training_counts_for_a_training(package: Path) -> None:
    assert after(package / "training/loop.py", "\n\n\ndef ", "\n\n\nADDED = 1\n\n\ndef ", "training")


def test_comments_and_docstrings_do_not_count(package: Path) -> None:
    assert not after(package / "nn/layers.py", "\n\n\nclass ", "\n\n\n# Said.\n\n\nclass ")
    assert not after(package / "nn/layers.py", '"""The building', '"""Some building')


def parsed(source: str) -> str:
    """As `code_of`, by Python's own tokenizer and parser."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node) is not None:
            text = node.body[0]
            lines[text.lineno - 1 : text.end_lineno] = [""] * len(lines[text.lineno - 1 : text.end_lineno])
    return "\n".join(line for line in lines if line.strip())


UNUSUAL = '''
class A:
    r"""Says # more."""

    def f(self, text="# no comment"):  # a comment

        # one more
        'says "it"'  # and another
        given = {"a":
            "one"
            "two"}
        return f"{text!r}#{given}", [self,  # "not a string
            'it''s', "\\"#", b"#"]

    async def g(self):
        """Says.

        More."""
        f"no docstring {self}"
        x = given[1:
            "a"]
        if x:
            return """
"kept"
# kept
"""
'''


def test_the_code_is_that_of_pythons_own_parser() -> None:
    sources = [path.read_text() for path in [*PACKAGE.rglob("*.py"), *Path(__file__).parents[1].rglob("*.py")]]
    assert len(sources) > 300
    for source in [UNUSUAL, *sources]:
        assert code_of(source) == parsed(source)


def test_imports_are_those_of_pythons_own_parser() -> None:
    n_found = 0
    for path in PACKAGE.rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        wanted = {
            name
            for node in nodes
            if node.module and node.module.split(".")[0] == "fusion"
            for module in ["/".join(node.module.split(".")[1:])]
            for name in (module, *(f"{module}/{alias.name}".lstrip("/") for alias in node.names))
        }
        assert set(provenance._imports(code_of(path.read_text()))) == wanted, path
        n_found += len(wanted)
    assert n_found > 1000
