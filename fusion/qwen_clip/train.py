"""Train qwen_clip: `python -m fusion.qwen_clip.train --data s3://bucket/data --output s3://bucket/output`.

The same under `torchrun --nproc-per-node=4 -m fusion.qwen_clip.train …`; on a CPU: `--device cpu --epochs 5`.
"""

import sys
from collections.abc import Sequence

from fusion.command import run
from fusion.qwen_clip.config import Config


def _job(config: Config) -> None:
    from fusion.qwen_clip.model import build_network
    from fusion.training import train

    train(config, build_network)


def main(argv: Sequence[str] | None = None) -> int:
    return run(Config, _job, argv, module="fusion.qwen_clip.train", doc=__doc__)


if __name__ == "__main__":
    sys.exit(main())
