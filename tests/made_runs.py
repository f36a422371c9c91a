"""Writes the files of a run as a training would, for tests of commands that only read runs."""

from __future__ import annotations

from typing import Any

from fusion import storage
from fusion.records.run import RunFolder

SHA = "0" * 64


def make_run(
    output: str,
    run_id: str,
    *,
    variant: str = "qwen_clip",
    smapes: tuple[float | None, ...] = (50.0,),
    code: int | None = 0,
    error: str = "",
    started: str = "2026-01-02T03:04:05Z",
    split: str = SHA,
) -> str:
    """Writes a run and returns its URL.

    Args:
        smapes: validation SMAPE of each checkpoint, None for one that was not validated; empty for a run that ended
            before it had read its data.
        code: exit code of its only attempt; None: the attempt has not ended.
        split: digest of the validation rows.
    """
    run = RunFolder.named(output, run_id).url
    write(f"{run}/config.json", {"data": "data", "width": 16})
    write(f"{run}/lease.json", {"attempt": 1, "token": "t", "started": started})
    write(f"{run}/attempts/1/start.json", {"attempt": 1, "started": started})
    if smapes:
        facts = {"config_sha256": SHA, "data_sha256": SHA, "dims": {"clip_image": 4}}
        write(f"{run}/run.json", {"run_id": run_id, "variant": variant, "started": started, **facts})
        storage.write(f"{run}/split.parquet", b"rows")
    for step, smape in enumerate(smapes):
        write(f"{run}/checkpoints/step-{step:08}/MANIFEST.json", checkpoint(step, smape, split))
    if code is not None:
        end = {"attempt": 1, "code": code, "step": 0, "ended": started, "error": error}
        write(f"{run}/attempts/1/exit.json", end)
    return run


def checkpoint(step: int, smape: float | None, split: str = SHA) -> dict[str, Any]:
    """The manifest of a checkpoint without files."""
    digests = {"config_sha256": SHA, "data_sha256": SHA, "split_sha256": split, "revision": "unknown"}
    return {"schema": 1, "files": [], "step": step, "epoch": step, "smape": smape, "finished": True, **digests}


def serve(output: str, variant: str, run_id: str, smape: float) -> None:
    """Points `best` of the variant to the run."""
    target = {"run_id": run_id, "checkpoint": "step-00000000", "smape": smape}
    write(f"{output}/pointers/runs/{variant}/best.json", target)


def write(url: str, document: Any) -> None:
    storage.write(url, storage.as_json(document))
