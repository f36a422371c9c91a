"""TabM (Gorishniy et al., 2024, arXiv 2410.24210), TabR (Gorishniy et al., 2023, arXiv 2307.14338), and RealMLP.

RealMLP: Holzmüller et al., 2024, arXiv 2407.04491.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.fold import log_smape, n_threads
from benchmarks.quality.inputs import Inputs

Settings = Mapping[str, Any]


def tabm(inputs: Inputs, settings: Settings) -> np.ndarray:
    """TabM with the L1 loss. The number of epochs is the one that is best on the tuning rows."""
    fold, losses = inputs.fold, list[float]()
    for predict in tabm_epochs(inputs, settings, fold.train[~fold.tunes]):
        losses.append(log_smape(predict(fold.train[fold.tunes]), fold.targets[fold.tunes]))
        if len(losses) - int(np.argmin(losses)) > settings["patience"]:
            break
    *_, predict = islice(tabm_epochs(inputs, settings, fold.train), int(np.argmin(losses)) + 1)
    return predict(fold.held)


def tabm_epochs(inputs: Inputs, settings: Settings, rows: np.ndarray) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """Trains on these of the training rows; after each epoch, yields the function that predicts with the model."""
    fold, device = inputs.fold, inputs.shared.device
    mean, deviation = fold.targets.mean(), fold.targets.std()
    x = torch.from_numpy(inputs.reduced).to(device)
    y = torch.from_numpy(((fold.targets_of(rows) - mean) / deviation).astype(np.float32)).to(device)
    known, training = torch.from_numpy(rows), _TabM(x.shape[1], settings, device)
    for _ in range(settings["epochs"]):
        training.epoch(x, y, known)
        yield lambda wanted: np.asarray(training.predict(x[torch.from_numpy(wanted)]) * deviation + mean)


class _TabM:
    """A TabM model and its optimizer. The same settings give the same model."""

    def __init__(self, n_features: int, settings: Settings, device: torch.device) -> None:
        from tabm import TabM

        torch.manual_seed(0)
        shape = {name: settings[name] for name in ("k", "n_blocks", "d_block", "dropout")}
        self.model: nn.Module = TabM.make(n_num_features=n_features, d_out=1, **shape).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"]
        )
        self.batch, self.generator = settings["batch"], torch.Generator().manual_seed(0)

    def epoch(self, x: Tensor, y: Tensor, rows: Tensor) -> None:
        """One pass over the training rows [r], which have the targets y [r]."""
        self.model.train()
        for batch in torch.randperm(len(rows), generator=self.generator).split(self.batch):
            with torch.autocast(x.device.type, torch.bfloat16):
                predicted = self.model(x[rows[batch]])[..., 0]
            loss = (predicted.float() - y[batch][:, None]).abs().mean()  # each of the k members has its own loss
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    @torch.no_grad()
    def predict(self, x: Tensor) -> np.ndarray:
        """[n] mean prediction of the k members."""
        self.model.eval()
        parts = [self.model(chunk)[..., 0].mean(1) for chunk in x.split(1024)]
        return torch.cat(parts).double().cpu().numpy()


def realmlp(inputs: Inputs, settings: Settings) -> np.ndarray:
    """RealMLP with its tuned defaults, which predicts the median. The best epoch is chosen on the tuning rows."""
    from pytabkit import RealMLP_TD_Regressor

    return _fitted(RealMLP_TD_Regressor, inputs, settings)


def tabr(inputs: Inputs, settings: Settings) -> np.ndarray:
    """TabR-S, which attends to labelled training rows. The best epoch is chosen on the tuning rows.

    pytabkit cannot train it again on all rows, so it never learns from the tuning rows.
    """
    from pytabkit import TabR_S_D_Regressor

    return _fitted(TabR_S_D_Regressor, inputs, settings, n_refit=0)


def _fitted(regressor: Callable[..., Any], inputs: Inputs, settings: Settings, n_refit: int = 1) -> np.ndarray:
    """The predictions of one of pytabkit's models.

    Args:
        n_refit: 1: it is trained again on all rows, for as many epochs as were best.
    """
    fold, x = inputs.fold, inputs.reduced
    given = {"device": inputs.shared.device.type, "n_threads": n_threads(), "random_state": 0}
    given |= {"n_cv": 1, "n_refit": n_refit, "val_metric_name": "mae"}
    # It prints its progress, and writes checkpoints, by default into the working folder.
    with contextlib.redirect_stdout(sys.stderr), TemporaryDirectory(prefix="fusion-peer-") as folder:
        model = regressor(**given, **settings, tmp_folder=folder)
        model.fit(x[fold.train], fold.targets, val_idxs=np.flatnonzero(fold.tunes))
        return np.asarray(model.predict(x[fold.held]), np.float64).reshape(len(fold.held), -1)[:, 0]
