"""Measures changes of the default recipe: `python -m benchmarks.recipe --data DATA --output FOLDER [-- FLAGS]`.

Trains the default recipe with 5 folds, and again with each change. FLAGS, such as --sources.clip-image, are passed to
every training. Prints the out-of-fold SMAPE of each, and the paired difference to the default, with a standard error
that is clustered by groups of near-duplicates. A difference of less than two standard errors may be chance. Finished
runs are not trained again.

    … --only "no noise" "batches of 64"             these changes alone
    … --variant qwen_clip                             of the other variant
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fusion.compare.out_of_fold import find_run, scored, shared
from fusion.compare.standard_errors import Estimate, clustered_mean
from fusion.metrics import row_smape
from fusion.nn.batch import Batch
from fusion.nn.price_model import PriceModel
from fusion.prediction.resumable import Arrays
from fusion.training.order import GlobalBatch
from fusion.training.trainer import Beat, Fit

DEFAULT = "the default"
CHANGES = {
    "no neighbours": "--neighbours 0",
    "32 neighbours": "--neighbours 32",
    "512 neighbours": "--neighbours 512",
    "no neighbour hidden": "--neighbour-dropout 0",
    "64 components": "--components 64",
    "512 components": "--components 512",
    "no inputs dropped": "--input-dropout 0",
    "no noise": "--input-noise 0",
    "less dropout": "--dropout 0.25",
    "no source hidden": "--modality-dropout 0",
    "a fifth of the sources hidden": "--modality-dropout 0.2",
    "loss weighted_smape": "--loss weighted_smape",
    "loss huber": "--loss huber",
    "plateau instead of cosine": "--schedule plateau",
    "no warm-up": "--warmup 0",
    "half the learning rate": "--lr 1e-3",
    "twice the learning rate": "--lr 4e-3",
    "batches of 64": "--batch-size 64",
    "batches of 1024": "--batch-size 1024",
    "10 epochs": "--epochs 10",
    "40 epochs": "--epochs 40",
    "half the width": "--width 96 --hidden 128",
    "twice the width": "--width 384 --hidden 512",
    "attention and experts": "--model fusion",
    "3 seeds": "--seeds 3",
}


class _Averaged(Fit):
    """Validates with an exponential moving average of the weights."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.99))  # type: ignore[no-untyped-call]

    def _train_batch(self, batch: GlobalBatch, inputs: Batch | None) -> Tensor:
        loss = super()._train_batch(batch, inputs)
        self.average.update_parameters(self.model)
        return loss

    def _validate(self, beat: Beat) -> tuple[float, Arrays]:
        steps = copy.deepcopy(self.model.state_dict())
        self.model.load_state_dict(self.average.module.state_dict())
        found = super()._validate(beat)
        self.model.load_state_dict(steps)
        return found


def _unit_vector(_: PriceModel, role: str, x: Tensor) -> Tensor:
    scaled: Tensor = F.normalize(x, dim=1) * x.shape[1] ** 0.5
    return scaled


# Changes without a flag: name to what is replaced in the code, and by what. Mixup is not among them, because a mixture
# of two products has no neighbours from which its price could be computed.
IN_CODE: dict[str, tuple[str, Any]] = {
    "average of weights": ("fusion.training.loop.Fit", _Averaged),
    "unit vectors": ("fusion.nn.price_model.PriceModel.standardised_role", _unit_vector),
}


ALL = [*CHANGES, *IN_CODE]


def main(argv: Sequence[str] | None = None) -> int:
    options = _parsed(argv)
    train = import_module(f"fusion.{options.variant}.train").main
    flags = ["--data", options.data, "--output", options.output, "--folds", "5", *options.flags]
    for name in [DEFAULT, *options.only]:
        with patch(*IN_CODE[name]) if name in IN_CODE else nullcontext():
            code: int = train([*flags, "--run-id", _run_id(options.variant, name), *CHANGES.get(name, "").split()])
        if code:
            return code
    print("\n".join(_table(options)))
    return 0


def _table(options: argparse.Namespace) -> Iterator[str]:
    """Lines of Markdown."""
    names = [DEFAULT, *options.only]
    runs = [scored(find_run(options.output, _run_id(options.variant, name))) for name in names]
    rows = shared(runs)
    errors = [row_smape(rows.prices, predicted) for predicted in rows.predicted]
    yield f"{len(rows):,} rows\n\n| change | flags | SMAPE | to the default |\n|---|---|---:|---:|"
    for name, of_run in zip(names, errors, strict=True):
        difference = clustered_mean(of_run - errors[0], rows.groups)
        yield f"| {name} | `{CHANGES.get(name, '')}` | {of_run.mean():.2f} | {_said(difference)} |"


def _said(difference: Estimate) -> str:
    if not difference.error:
        return ""
    if not difference.is_significant:
        verdict = "chance"
    elif difference.mean < 0:
        verdict = "better"
    else:
        verdict = "worse"
    return f"{difference.mean:+.2f} ({difference.error:.2f}) {verdict}"


def _run_id(variant: str, name: str) -> str:
    return f"recipe-{variant}-{name}".replace(" ", "-").replace("_", "-")


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--variant", default="all_embeddings", choices=("all_embeddings", "qwen_clip"))
    parser.add_argument("--only", nargs="+", choices=ALL, default=ALL, metavar="CHANGE")
    parser.add_argument("flags", nargs="*", help="flags of every training")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
