"""Settings of the variant with one image and one text source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from fusion.config import STRICT, RunConfig, setting


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sources:
    clip_image: str = setting("clip_image", "image embeddings", "sources")
    qwen_text: str = setting("qwen_text", "text embeddings", "sources")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config(RunConfig):
    variant: ClassVar[str] = "qwen_clip"

    earlier_tokens: ClassVar[int] = 4
    published: ClassVar[Mapping[str, Any]] = {**RunConfig.published, "hidden": (512, 256, 128)}
    sources: Sources = Sources()
    hidden: tuple[PositiveInt, ...] = setting(
        (256,), "features of the hidden layers of each expert", "model", min_length=1
    )
    # With a single token on each side, attention would have nothing to choose from.
    n_tokens: int = setting(4, "tokens that attention gets of each source", "model", ge=2)
