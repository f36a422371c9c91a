"""Tests the checks before publication: are damaged nightly inputs refused, and correct ones published?

    python benchmarks/nights.py --data DATA --output WORK [flags of all_embeddings.train]

Trains small models on the data, then runs `predict_test` as on successive nights, with embeddings or prices that are
damaged in one way each: on the second night after a correct one, or on the first night. Prints for each whether the
submission was published, and the reasons. The limits in `fusion/submissions/guards.py` were chosen with this table. It
takes about 10 minutes for 10,000 rows on 2 cores.

    python benchmarks/nights.py --data DATA --output WORK --sources.clip-image my_images … --epochs 8
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from fusion.all_embeddings import predict_test, train
from fusion.all_embeddings.config import Config
from fusion.command.settings import parse

SMALL = ["--width", "64", "--hidden", "64", "32", "--loss", "smape", "--lr", "1e-3", "--epochs", "8", "--device", "cpu"]
NEW = 0.2  # share of products that are new on one of the nights
MONTH = (1.0, 1.033, 1.067, 1.1)  # factors of all prices in four weekly trainings: a rise of 10% in a month

Sources = dict[str, tuple[np.ndarray, np.ndarray]]  # of the test rows: source to ids [N] and vectors [N, D]
Change = Callable[[Sources], None]  # changes the sources in place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the input, as CSV and one file per source")
    parser.add_argument("--output", type=Path, required=True, help="empty folder to work in, about twice as large")
    options, flags = parser.parse_known_args()
    bindings = parse(Config, flags, prog="nights", description="").bindings()
    nights = Nights(options.data, options.output, [*SMALL, *flags], bindings)
    nights.train("honest")
    print(f"{'night':56s} {'decision':10s} why")
    for name, change in changes(bindings).items():
        nights.second(f"second night: {name}", change)
    for name, change in changes(bindings).items():
        nights.first(f"first night: {name}", change)
    nights.of_other_models()


def changes(bindings: Mapping[str, str]) -> dict[str, Change]:
    texts = [name for role, name in bindings.items() if "text" in role]
    images = [name for role, name in bindings.items() if "image" in role]
    everything = [*texts, *images]
    found: dict[str, Change] = {"unchanged": lambda sources: None}
    for name in everything:
        found[f"{name} under shuffled ids"] = shuffled([name])
    found |= {"all texts shuffled": shuffled(texts), "all images shuffled": shuffled(images)}
    found |= {"all sources shuffled alike": shuffled(everything)}
    for name in everything:
        found[f"{name} all zeros"] = rescaled(name, 0.0)
        found[f"{name} halved"] = rescaled(name, 0.5)
        found[f"{name} of another encoder"] = rotated(name)
    found["20% of the products with new content"] = with_new_content(everything)
    found["rounded to other bits"] = rounded(everything)
    return found


def shuffled(names: list[str]) -> Change:
    def change(sources: Sources) -> None:
        for name in names:
            ids, vectors = sources[name]
            sources[name] = ids, vectors[np.random.default_rng(0).permutation(len(ids))]

    return change


def rescaled(name: str, factor: float) -> Change:
    def change(sources: Sources) -> None:
        ids, vectors = sources[name]
        sources[name] = ids, vectors * np.float32(factor)

    return change


def rotated(name: str) -> Change:
    """Rotates all vectors at random: as from an equally good encoder other than that of the training."""

    def change(sources: Sources) -> None:
        ids, vectors = sources[name]
        size = vectors.shape[1]
        rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((size, size)))[0]
        sources[name] = ids, (vectors @ rotation).astype(np.float32)

    return change


def with_new_content(names: list[str]) -> Change:
    """Replaces the first products by new ones: mixes vectors of other products with noise, alike in all sources."""

    def change(sources: Sources) -> None:
        for name in names:
            ids, vectors = sources[name]
            count = int(NEW * len(ids))
            noise = np.random.default_rng(1).standard_normal((count, vectors.shape[1])) * vectors.std(0)
            mixed = 0.7 * (vectors[-count:] - vectors.mean(0)) + 0.7 * noise + vectors.mean(0)
            sources[name] = ids, np.concatenate([mixed.astype(np.float32), vectors[count:]])

    return change


def rounded(names: list[str]) -> Change:
    def change(sources: Sources) -> None:
        for name in names:
            ids, vectors = sources[name]
            sources[name] = ids, vectors * (1 + 1e-3 * np.random.default_rng(2).standard_normal(vectors.shape))

    return change


class Nights:
    """Runs nightly predictions on a copy of the test rows, which each night may change."""

    def __init__(self, data: Path, work: Path, flags: list[str], bindings: Mapping[str, str]) -> None:
        self.data, self.work, self.flags, self.bindings = data, work, flags, bindings
        self.output = str(work / "output")
        (work / "data/embeddings/test").mkdir(parents=True)
        (work / "data/embeddings/train").symlink_to((data / "embeddings/train").resolve())
        shutil.copy(data / "test.csv", work / "data")
        shutil.copy(data / "train.csv", work / "data")
        self.sources = {name: _read(data / f"embeddings/test/{name}.parquet") for name in bindings.values()}
        self.number = 0

    def train(self, run_id: str, *flags: str) -> None:
        """Trains a run on the data in the work folder."""
        given = ["--data", str(self.work / "data"), "--output", self.output, "--run-id", run_id, *self.flags, *flags]
        with _silently():
            assert train.main(given) == 0, f"training {run_id} failed"

    def second(self, what: str, change: Change) -> None:
        self.number += 1
        self._night("2026-03-01", lambda sources: None)
        self._print(what, *self._night("2026-03-02", change))

    def first(self, what: str, change: Change) -> None:
        self.number += 1
        self._print(what, *self._night("2026-03-01", change))

    def of_other_models(self) -> None:
        """Nights with models of other seeds and prices, each after a night with the first model."""
        self.train("seed", "--seed", "7")
        self.number += 1
        self._night("2026-03-01", lambda sources: None)
        self._print("trained with another seed", *self._night("2026-03-02", lambda _: None, "seed"))
        texts = [name for role, name in self.bindings.items() if "text" in role]
        for what, change in (("all texts shuffled", shuffled(texts)), ("rotated", rotated(next(iter(self.sources))))):
            self.number += 1
            self._night("2026-03-01", lambda sources: None)
            self._print(f"another seed, and {what}", *self._night("2026-03-02", change, "seed"))
        self._month()
        self._scale_prices(lambda prices: prices * 0 + 19.99)
        self.train("constant", "--epochs", "2")
        self.number += 1
        self._print("after a training on one price: served", *self._night("2026-03-01", lambda sources: None, ""))
        self.number += 1
        self._print("trained on one price, by its --run-id", *self._night("2026-03-01", lambda _: None, "constant"))

    def _month(self) -> None:
        self.number += 1
        month = self.number
        for week, factor in enumerate(MONTH):
            self._scale_prices(lambda prices, factor=factor: prices * factor)
            self.train(f"week{week}", "--seed", str(week))
            self.number = month
            night = self._night(f"2026-03-{1 + 7 * week:02}", lambda sources: None, f"week{week}")
            self._print(f"prices {factor - 1:+.1%}, trained again", *night)

    def _scale_prices(self, scale: Callable[[pd.Series], pd.Series]) -> None:
        table = pd.read_csv(self.data / "train.csv", dtype="str", keep_default_na=False)
        prices = scale(pd.to_numeric(table["price"]))
        table.assign(price=prices).to_csv(self.work / "data/train.csv", index=False)

    def _night(self, date: str, change: Change, run_id: str = "honest") -> tuple[int, str]:
        sources = dict(self.sources)
        change(sources)
        for name, (ids, vectors) in sources.items():
            frame = pd.DataFrame({"sample_id": ids, "embedding": list(vectors.astype(np.float32))})
            frame.to_parquet(self.work / f"data/embeddings/test/{name}.parquet", index=False)
        given = [
            "--data",
            str(self.work / "data"),
            "--output",
            self.output,
            "--name",
            f"n{self.number}",
            "--date",
            date,
        ]
        with _silently() as said:
            code = predict_test.main([*given, "--device", "cpu", *(["--run-id", run_id] if run_id else [])])
        return code, said.getvalue()

    def _print(self, what: str, code: int, said: str) -> None:
        reasons = [
            line.removeprefix("error: not published: ") for line in said.splitlines() if line.startswith("error:")
        ]
        reasons += re.findall(r"event=doubtful reason=\"(.*?)\"", said) if not reasons else []
        reasons += re.findall(r"event=(prices_moved .*|compared .*)", said) if not reasons else []
        decision = {0: "published", 65: "refused"}.get(code, f"exit {code}")
        print(f"{what:56s} {decision:10s} {'; '.join(reasons)[:200]}", flush=True)


@contextlib.contextmanager
def _silently() -> Iterator[io.StringIO]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        yield said


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    frame = pd.read_parquet(path)
    return frame["sample_id"].to_numpy(), np.stack(frame["embedding"].to_numpy()).astype(np.float32)


if __name__ == "__main__":
    main()
