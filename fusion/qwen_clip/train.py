"""Train qwen_clip on the products of train.csv.

    python -m fusion.qwen_clip.train --data s3://bucket/data --output s3://bucket/output
    python -m fusion.qwen_clip.train --data data --sources.clip-image photos --sources.qwen-text titles

Writes runs/<run id>/ in --output: the model, its metrics and the log. The same command again continues a run that was
stopped.

On several GPUs: `python -m fusion.launch fusion.qwen_clip.train ...`, or torchrun in place of fusion.launch.
On a CPU: --device cpu.
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
