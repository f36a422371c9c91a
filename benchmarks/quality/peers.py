"""The peers: models that one might use instead of Fusion, with their settings and their tuning.

Every peer predicts log prices. Boosting rounds, epochs, regularisation and the number of neighbours are tuned on a
fifth of the fold's training groups; then the peer is trained on all training rows. Other settings are the libraries'
defaults, except for those below, which were chosen by first tries on such tuning rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks.quality import neural
from benchmarks.quality.fold import chosen, log_smape, n_threads
from benchmarks.quality.inputs import VARIANTS, Inputs

Settings = Mapping[str, Any]
Learn = Callable[[Inputs, Settings], np.ndarray]
Predict = Callable[[np.ndarray], np.ndarray]  # from positions [n] among all rows to their log prices [n]


@dataclass(frozen=True)
class Peer:
    """A model to compare with.

    Attributes:
        learn: function of (inputs, settings) that returns the log prices [m] of a fold's rows to predict.
        settings: all settings that are not the library's defaults.
        library: name of its distribution package. Predictions of another version are cached separately.
        variants: the inputs with which it is measured; kernel regression, for example, always uses neighbours.
    """

    learn: Learn
    settings: Settings
    library: str
    variants: tuple[str, ...]

    def version(self) -> str | None:
        """Version of its library; None if it is not installed."""
        try:
            return metadata.version(self.library)
        except metadata.PackageNotFoundError:
            return None


def median(inputs: Inputs, settings: Settings) -> np.ndarray:
    return np.full(len(inputs.fold.held), np.median(inputs.fold.targets))


def kernel(inputs: Inputs, settings: Settings) -> np.ndarray:
    return inputs.shared.kernel(inputs.with_text).predicted(inputs.shared.weights(inputs.with_text))


def ridge(inputs: Inputs, settings: Settings) -> np.ndarray:
    from sklearn.linear_model import Ridge

    fold, x = inputs.fold, inputs.wide

    def predict(alpha: float, known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        model = Ridge(alpha).fit(x[fold.train[known]], fold.targets[known])
        return np.asarray(model.predict(x[fold.train[wanted]]))

    alpha = chosen(fold, settings["alphas"], predict)
    return np.asarray(Ridge(alpha).fit(x[fold.train], fold.targets).predict(x[fold.held]))


def nearest(inputs: Inputs, settings: Settings) -> np.ndarray:
    """Mean log price of the k rows with the highest sum of cosines over the sources."""
    from sklearn.neighbors import NearestNeighbors

    fold, most = inputs.fold, max(settings["k"])
    x = np.hstack([np.asarray(part) for part in inputs.shared.kernel(False).parts.values()])

    def means(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """[W, K] mean log price of the nearest 1, 2, … K among the training rows at these positions."""
        finder = NearestNeighbors(n_neighbors=min(most, len(known)), algorithm="brute").fit(x[fold.train[known]])
        near = fold.targets[known][finder.kneighbors(x[wanted], return_distance=False)]
        return np.asarray(near.cumsum(axis=1) / np.arange(1, near.shape[1] + 1))

    tuning = means(np.flatnonzero(~fold.tunes), fold.train[fold.tunes])
    allowed = [k for k in settings["k"] if k <= tuning.shape[1]]
    k = min(allowed, key=lambda k: log_smape(tuning[:, k - 1], fold.targets[fold.tunes]))
    return means(np.arange(len(fold.train)), fold.held)[:, k - 1]


def mlp(inputs: Inputs, settings: Settings) -> np.ndarray:
    """scikit-learn's MLP on principal components. The number of epochs is the one that is best on the tuning rows."""
    fold = inputs.fold
    known, wanted = fold.train[~fold.tunes], fold.train[fold.tunes]
    losses = [log_smape(predict(wanted), fold.targets[fold.tunes]) for predict in mlp_epochs(inputs, settings, known)]
    return last(mlp_epochs(inputs, settings, fold.train), int(np.argmin(losses)) + 1)(fold.held)


def mlp_epochs(inputs: Inputs, settings: Settings, rows: np.ndarray) -> Iterator[Predict]:
    """Trains on these of the training rows; after each epoch, yields the function that predicts with the model."""
    from sklearn.neural_network import MLPRegressor

    fold, x = inputs.fold, inputs.reduced
    given = {name: value for name, value in settings.items() if name != "epochs"}
    mean, deviation = fold.targets.mean(), fold.targets.std()
    targets = (fold.targets_of(rows) - mean) / deviation
    model = MLPRegressor(random_state=0, **given)
    for _ in range(settings["epochs"]):
        model.partial_fit(x[rows], targets)
        yield lambda wanted: np.asarray(model.predict(x[wanted]) * deviation + mean)


def lightgbm(inputs: Inputs, settings: Settings) -> np.ndarray:
    import lightgbm as lgb

    fold, x = inputs.fold, tree_inputs(inputs, settings)
    given = lightgbm_settings(settings)
    tuning = lgb.Dataset(x[fold.train[~fold.tunes]], fold.targets[~fold.tunes], params=given, free_raw_data=False)
    judge = tuning.create_valid(x[fold.train[fold.tunes]], fold.targets[fold.tunes])
    stop = lgb.early_stopping(settings["patience"], verbose=False)
    rounds = lgb.train(given, tuning, settings["rounds"], valid_sets=[judge], callbacks=[stop]).best_iteration
    return last(lightgbm_rounds(inputs, settings, fold.train), rounds)(fold.held)


def lightgbm_settings(settings: Settings) -> dict[str, Any]:
    return {**booster_settings(settings), "num_threads": n_threads(), "verbosity": -1, "seed": 0}


def lightgbm_rounds(inputs: Inputs, settings: Settings, rows: np.ndarray) -> Iterator[Predict]:
    """Trains on these of the training rows; after each round, yields the function that predicts with all trees."""
    import lightgbm as lgb

    x, given = tree_inputs(inputs, settings), lightgbm_settings(settings)
    model = lgb.Booster(given, lgb.Dataset(x[rows], inputs.fold.targets_of(rows), params=given))
    for _ in range(settings["rounds"]):
        model.update()
        yield lambda wanted: np.asarray(model.predict(x[wanted]))


def last(steps: Iterator[Predict], number: int) -> Predict:
    """The function that is yielded after this number of steps."""
    return next(islice(steps, number - 1, None))


def xgboost(inputs: Inputs, settings: Settings) -> np.ndarray:
    import xgboost as xgb

    fold, x = inputs.fold, tree_inputs(inputs, settings)
    device = inputs.shared.device.type
    given = {**booster_settings(settings), "nthread": n_threads(), "device": device, "seed": 0}
    tuning = xgb.QuantileDMatrix(x[fold.train[~fold.tunes]], fold.targets[~fold.tunes])
    judge = xgb.QuantileDMatrix(x[fold.train[fold.tunes]], fold.targets[fold.tunes], ref=tuning)
    early = {"early_stopping_rounds": settings["patience"], "verbose_eval": False}
    rounds = xgb.train(given, tuning, settings["rounds"], evals=[(judge, "tuning")], **early).best_iteration + 1
    model = xgb.train(given, xgb.QuantileDMatrix(x[fold.train], fold.targets), rounds)
    return np.asarray(model.predict(xgb.DMatrix(x[fold.held])))


def catboost(inputs: Inputs, settings: Settings) -> np.ndarray:
    from catboost import CatBoostRegressor, Pool

    fold, x = inputs.fold, tree_inputs(inputs, settings)
    given = {**booster_settings(settings), "thread_count": n_threads(), "random_seed": 0, "verbose": False}
    given |= {"allow_writing_files": False}
    tuning = Pool(x[fold.train[~fold.tunes]], fold.targets[~fold.tunes])
    judge = Pool(x[fold.train[fold.tunes]], fold.targets[fold.tunes])
    model = CatBoostRegressor(iterations=settings["rounds"], **given)
    model.fit(tuning, eval_set=judge, early_stopping_rounds=settings["patience"])
    final = CatBoostRegressor(iterations=model.get_best_iteration() + 1, **given)
    return np.asarray(final.fit(x[fold.train], fold.targets).predict(x[fold.held]))


def tree_inputs(inputs: Inputs, settings: Settings) -> np.ndarray:
    return inputs.raw if settings["inputs"] == "raw" else inputs.reduced


def booster_settings(settings: Settings) -> dict[str, Any]:
    """The settings that are passed to the library."""
    return {name: value for name, value in settings.items() if name not in ("inputs", "rounds", "patience")}


def peer(learn: Learn, library: str, *, variants: tuple[str, ...] = VARIANTS[1:], **settings: Any) -> Peer:
    return Peer(learn, MappingProxyType(settings), library, variants)


PEERS: dict[str, Peer] = {
    "median": peer(median, "numpy", variants=("prices",)),
    "nearest": peer(nearest, "scikit-learn", variants=("embeddings",), k=(1, 2, 3, 5, 8, 13, 21, 34)),
    "kernel": peer(kernel, "torch", variants=("embeddings", "embeddings + text")),
    "ridge": peer(ridge, "scikit-learn", alphas=(1e2, 1e3, 3e3, 1e4, 3e4, 1e5)),
    "mlp": peer(
        mlp,
        "scikit-learn",
        hidden_layer_sizes=(512, 256),
        alpha=1.0,
        batch_size=128,
        learning_rate_init=5e-4,
        epochs=40,
    ),
    "lightgbm": peer(
        lightgbm,
        "lightgbm",
        inputs="reduced",
        rounds=3000,
        patience=50,
        objective="l2",
        metric="l1",
        learning_rate=0.03,
        num_leaves=15,
        feature_fraction=0.5,
        bagging_fraction=0.8,
        bagging_freq=1,
    ),
    "xgboost": peer(
        xgboost,
        "xgboost",
        inputs="reduced",
        rounds=2000,
        patience=50,
        objective="reg:squarederror",
        eval_metric="mae",
        learning_rate=0.05,
        max_depth=5,
        min_child_weight=20,
        colsample_bytree=0.5,
        subsample=0.8,
    ),
    "catboost": peer(
        catboost,
        "catboost",
        inputs="reduced",
        rounds=2000,
        patience=50,
        loss_function="RMSE",
        eval_metric="MAE",
        learning_rate=0.08,
        depth=6,
    ),
    "tabm": peer(
        neural.tabm,
        "tabm",
        k=32,
        n_blocks=3,
        d_block=512,
        dropout=0.1,
        lr=2e-3,
        weight_decay=3e-4,
        batch=256,
        epochs=60,
        patience=10,
    ),
    "tabr": peer(neural.tabr, "skorch", n_epochs=60, patience=10, batch_size=256),
    "realmlp": peer(neural.realmlp, "pytabkit", n_epochs=256, train_metric_name="multi_pinball(0.5)"),
}
