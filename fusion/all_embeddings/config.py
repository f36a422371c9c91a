"""Settings of the variant with two image and two text sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from fusion.config import STRICT, RunConfig, setting


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sources:
    clip_image: str = setting("clip_image", "first image embeddings", "sources")
    siglip_image: str = setting("siglip_image", "second image embeddings", "sources")
    siglip_text: str = setting("siglip_text", "first text embeddings", "sources")
    qwen_text: str = setting("qwen_text", "second text embeddings", "sources")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config(RunConfig):
    variant: ClassVar[str] = "all_embeddings"

    earlier_tokens: ClassVar[int] = 2
    published: ClassVar[Mapping[str, Any]] = {**RunConfig.published, "hidden": (1024, 512, 256)}
    sources: Sources = Sources()
    hidden: tuple[PositiveInt, ...] = setting(
        (256,), "features of the hidden layers of each expert", "model", min_length=1
    )
