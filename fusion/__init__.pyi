# The types of the public names, which `__init__.py` loads on first use.
from fusion.api.loading import load as load
from fusion.api.model import Model as Model
from fusion.api.scoring import score as score
from fusion.api.settings import make_config as make_config
from fusion.api.training import train as train
from fusion.config import RunConfig as RunConfig
from fusion.errors import FusionError as FusionError
from fusion.evaluation import evaluate_by_groups as evaluate_by_groups
from fusion.loss_functions import get_loss_function as get_loss_function
from fusion.metrics import compute_metrics as compute_metrics
from fusion.metrics import compute_smape as compute_smape
from fusion.prediction import predict_test as predict_test
from fusion.records import pointers as pointers
from fusion.records.portable import load_checkpoint as load_checkpoint
from fusion.records.portable import save_checkpoint as save_checkpoint
from fusion.training.early_stopping import EarlyStopping as EarlyStopping
from fusion.training.seeds import set_seed as set_seed

__version__: str
