"""Variables in `slurm/cluster.toml`: `pytest tests/jobs/test_slurm_settings.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion.errors import ConfigError
from tests.jobs.test_submit import here, settings


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        *((name, True) for name in ("AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "FSSPEC_S3_KEY", "FSSPEC_S3_SECRET")),
        *((name, True) for name in ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS_TOKEN", "MY_API_KEY")),
        *((name, True) for name in ("DB_PASSWD", "DBPASSWORD", "apikey", "GITHUB_PAT", "MY_CREDENTIALS", "HF_TOKEN")),
        *((name, False) for name in ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SHARED_CREDENTIALS_FILE", "HTTPS_PROXY")),
        *((name, False) for name in ("GOOGLE_APPLICATION_CREDENTIALS", "TOKENIZERS_PARALLELISM", "KEYBOARD", "PATH")),
    ],
)
def test_secrets_in_the_environment_of_jobs_are_refused(tmp_path: Path, name: str, is_secret: bool) -> None:
    text = f"[environment]\n{name} = 'x'"
    if not is_secret:
        assert settings(tmp_path, text).environment == {name: "x"}
        return
    with pytest.raises(ConfigError, match=f"environment holds {name}"):
        settings(tmp_path, text)


def test_an_empty_variable_is_unset(tmp_path: Path) -> None:
    settings(tmp_path, "[environment]\nFUSION_DATA = 's3://b/data'\nFUSION_RUN_ID = ''\nAWS_PROFILE = ''\nA = '1'")
    flags = ("--cluster=slurm", "--dry-run", f"--settings={tmp_path}/cluster.toml")
    done = here(*flags, env={"FUSION_DATA": ""})
    assert done.code == 0, done.err
    assert "fusion.all_embeddings.train --data s3://b/data\n" in done.out
    assert "export A=1\n" in done.out
    assert "AWS_PROFILE" not in done.out
