"""Train all_embeddings: `python -m fusion.all_embeddings.train --data s3://bucket/data --output s3://bucket/output`.

The same under `torchrun --nproc-per-node=4 -m fusion.all_embeddings.train …`; on a CPU: `--device cpu --epochs 5`.
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
