"""Train all_embeddings on the products of train.csv.

    python -m fusion.all_embeddings.train --data s3://bucket/data --output s3://bucket/output
    python -m fusion.all_embeddings.train --data data --sources.clip-image photos --sources.qwen-text titles

Writes runs/<run id>/ in --output: the model, its metrics and the log. The same command again continues a run that was
stopped.

On several GPUs: `python -m fusion.launch fusion.all_embeddings.train ...`, or torchrun in place of fusion.launch.
On a CPU: --device cpu.
"""

import sys
from collections.abc import Sequence

from fusion.all_embeddings.config import Config
from fusion.command import run


def _job(config: Config) -> None:
    from fusion.all_embeddings.model import build_network
    from fusion.training import train

    train(config, build_network)


def main(argv: Sequence[str] | None = None) -> int:
    return run(Config, _job, argv, module="fusion.all_embeddings.train", doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
