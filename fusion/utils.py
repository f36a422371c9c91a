"""Public helpers in one place: `from fusion.utils import set_seed, compute_smape, EarlyStopping, …`."""

from fusion.metrics import compute_metrics, compute_smape
from fusion.records.portable import load_checkpoint, save_checkpoint
from fusion.training.early_stopping import EarlyStopping
from fusion.training.seeds import set_seed

__all__ = ["EarlyStopping", "compute_metrics", "compute_smape", "load_checkpoint", "save_checkpoint", "set_seed"]
