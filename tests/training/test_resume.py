"""Resuming: after a stop, a kill or damage, the same command continues, and ends with the same bytes.

Also that of two jobs with one run id, only one writes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest

from fusion import storage
from fusion.all_embeddings import evaluate_by_groups, predict_test, train
from fusion.errors import SupersededError, UnreachableError
from fusion.records import checkpoint, manifests, pointers
from fusion.records.attempts import take_lease
from fusion.records.run import RunFolder
from fusion.records.schemas import FileEntry, RunPointer
from fusion.verify import __main__ as verify
from tests import fork_server
from tests.chaos.boundaries import ALL, KINDS, Boundary
from tests.conftest import SMALL, run_command, upload
from tests.documents import edit
from tests.forked import run_commands

ROOT = Path(__file__).parents[2]


def flags(catalog: Path | str, output: Path | str, *more: str) -> list[str]:
    where = ["--data", str(catalog), "--output", str(output), "--run-id", "r"]
    return [*where, *SMALL, "--epochs", "4", "--checkpoint-steps", "3", *more]


def model_bytes(output: Path) -> bytes:
    return manifests.read_file(RunFolder(str(output / "runs" / "r")).best(), manifests.MODEL)


def validation_bytes(output: Path) -> bytes:
    return manifests.read_file(RunFolder(str(output / "runs" / "r")).best(), manifests.VALIDATION)


def curve(output: Path) -> pd.DataFrame:
    return pd.read_csv(output / "runs/r/metrics/epochs.csv")[["loss", "smape"]]


@pytest.fixture(scope="module")
def undisturbed(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    assert train.main(flags(catalog, output)) == 0
    return output


def stopped_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Sends a stop signal at the first synchronisation of the ranks at or after the step."""
    import fusion.training.saver

    original = fusion.training.saver.Saver.agree

    def agree(self: fusion.training.saver.Saver, **options: bool) -> None:
        if self.fit.step >= step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, **options)

    monkeypatch.setattr(fusion.training.saver.Saver, "agree", agree)


def test_blocks_of_rows_resume_on_any_number_of_ranks(catalog: Path, tmp_path: Path) -> None:
    def trained(output: str, ranks: int, stop_at: str = "") -> tuple[int, str]:
        line = ["tests.small_blocks", *flags(catalog, tmp_path / output, "--shuffle", "blocks")]
        done = run_commands(ranks, [line], env={"FUSION_TEST_STOP_AT": stop_at} if stop_at else {})
        return done.returncode, done.stderr

    assert trained("whole", 1)[0] == 0
    assert trained("resumed", 1, stop_at="9")[0] == 75
    code, said = trained("resumed", 1)
    assert code == 0 and " step=9" in said and "shuffle=blocks" in said
    assert model_bytes(tmp_path / "resumed") == model_bytes(tmp_path / "whole")
    assert trained("ranks", 2, stop_at="9")[0] == 75
    assert trained("ranks", 2)[0] == 0
    whole, ranks = (curve(tmp_path / name) for name in ("whole", "ranks"))
    pd.testing.assert_frame_equal(whole, ranks, rtol=1e-5)


def test_members_resume_on_any_number_of_ranks(catalog: Path, tmp_path: Path) -> None:
    def trained(output: str, ranks: int, stop_at: str = "") -> int:
        more = ["--folds", "2", "--seeds", "2", "--epochs", "2"]
        line = ["tests.small_blocks", *flags(catalog, tmp_path / output, *more)]
        return run_commands(ranks, [line], env={"FUSION_TEST_STOP_AT": stop_at} if stop_at else {}).returncode

    assert trained("whole", 1) == 0
    assert trained("resumed", 1, stop_at="9") == 75 and trained("resumed", 1) == 0
    assert model_bytes(tmp_path / "resumed") == model_bytes(tmp_path / "whole")
    assert trained("ranks", 2, stop_at="9") == 75 and trained("ranks", 2) == 0
    whole, ranks = (curve(tmp_path / name) for name in ("whole", "ranks"))
    pd.testing.assert_frame_equal(whole, ranks, rtol=1e-5)


@pytest.mark.parametrize("step", [2, 8, 14])
def test_a_stopped_and_resumed_training_gives_the_same_bytes(
    step: int, catalog: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stopped_at(patch, step)
        assert train.main(flags(catalog, tmp_path)) == 75
    end = json.loads((tmp_path / "runs/r/attempts/1/exit.json").read_text())
    assert end["code"] == 75 and end["step"] >= step
    assert train.main(flags(catalog, tmp_path)) == 0
    assert model_bytes(tmp_path) == model_bytes(undisturbed)
    assert validation_bytes(tmp_path) == validation_bytes(undisturbed)
    columns = ["epoch", "step", "loss", "smape", "lr"]
    ours, theirs = (pd.read_csv(folder / "runs/r/metrics/epochs.csv")[columns] for folder in (tmp_path, undisturbed))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), (1, 2)])
def test_another_number_of_ranks_can_resume(
    before: int, after: int, catalog: Path, tmp_path: Path, undisturbed: Path
) -> None:
    from tests.conftest import run_command

    output = tmp_path / "out"
    stop = {"PYTHONPATH": str(ROOT), "FUSION_TEST_STOP_AT": "9"}
    first = run_command("tests.stopping_train", *flags(catalog, output), ranks=before, env=stop)
    assert first.code != 0 and "stopped on request at step 9" in first.err
    second = run_command("fusion.all_embeddings.train", *flags(catalog, output), ranks=after)
    assert second.code == 0, second.err
    assert "event=resumed" in second.err and " step=9" in second.err
    pd.testing.assert_frame_equal(curve(output), curve(undisturbed), rtol=1e-5)


def test_three_stops_without_progress_are_a_bug(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_at(monkeypatch, 2)
    assert train.main(flags(catalog, tmp_path)) == 75
    monkeypatch.setattr("fusion.training.trainer.AGREE_STEPS", 1)
    codes = []
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(
                "fusion.training.trainer.Fit.run_epoch", lambda self, beat: iter([None])
            )  # asked to stop before any step
            codes.append(train.main(flags(catalog, tmp_path)))
    assert codes == [75, 70, 75]  # the count restarts after the error
    assert "stopped three times in a row without a newer checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("document", "damage", "code", "said"),
    [
        ("lease.json", b"{", 65, "lease.json is damaged: expected JSON"),
        ("run.json", b"{}", 65, "run.json is damaged: expected run_id, found nothing of that name"),
        ("split.parquet", b"PAR1", 65, "split.parquet is not the one that the run was trained with"),
        ("attempts/1/exit.json", b"[]", 75, "event=attempt_damaged"),
    ],
)
def test_a_damaged_document_of_the_run_is_named(
    document: str,
    damage: bytes,
    code: int,
    said: str,
    catalog: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stopped_at(monkeypatch, 2)
    assert train.main(flags(catalog, tmp_path)) == 75
    (tmp_path / "runs/r" / document).write_bytes(damage)
    assert train.main(flags(catalog, tmp_path)) == code
    assert said in capsys.readouterr().err


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [manifests.MODEL, manifests.MANIFEST])
def test_a_damaged_finished_run_is_trained_again(
    name: str, catalog: Path, tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    last = RunFolder(str(tmp_path / "runs/r")).checkpoints()[-1]
    damaged(Path(last.url, name))
    if name == manifests.MODEL:
        assert predict_test.main(["--output", str(tmp_path), "--device", "cpu"]) == 65
        assert "start the training of this run again, which writes it again" in capsys.readouterr().err
    assert train.main(flags(catalog, tmp_path)) == 0
    again = RunFolder(str(tmp_path / "runs/r")).checkpoints()[-1]
    assert again.url == last.url and again.manifest.finished
    assert verify.main([str(tmp_path / "runs/r")]) == 0
    assert model_bytes(tmp_path) == model_bytes(undisturbed)
    assert train.main(flags(catalog, tmp_path)) == 0
    assert "event=finished_before" in capsys.readouterr().err.splitlines()[-1]


def test_the_step_of_a_damaged_checkpoint_is_committed_again(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_at(monkeypatch, 12)
    assert train.main(flags(catalog, tmp_path)) == 75
    stopped = RunFolder(str(tmp_path / "runs/r")).checkpoints()[-1]
    damaged(Path(stopped.url, manifests.STATE))
    assert train.main(flags(catalog, tmp_path)) == 75
    assert RunFolder(str(tmp_path / "runs/r")).checkpoints()[-1].url == stopped.url
    assert verify.main([str(tmp_path / "runs/r")]) == 0


def test_checkpoints_after_damaged_ones_are_kept(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stopped_at(patch, 12)
        assert train.main(flags(catalog, tmp_path, "--keep", "3")) == 75
    made = RunFolder(str(tmp_path / "runs/r")).checkpoints()
    assert [one.manifest.step for one in made] == [6, 9, 12]
    for one in made[1:]:
        damaged(Path(one.url, manifests.STATE))
    stopped_at(monkeypatch, 7)
    assert train.main(flags(catalog, tmp_path, "--keep", "1")) == 75
    assert RunFolder(str(tmp_path / "runs/r")).checkpoints()[-1].manifest.step == 7
    assert json.loads((tmp_path / "runs/r/attempts/2/exit.json").read_text())["step"] == 7


def test_a_run_with_a_changed_config_is_refused(
    tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "runs/r/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_heads": 1}))
    for job in (predict_test, evaluate_by_groups):
        assert job.main(["--output", str(tmp_path), "--device", "cpu"]) == 65
        assert "config.json has other settings than step-" in capsys.readouterr().err


def test_a_run_with_a_changed_split_is_refused(
    tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "runs/r/split.parquet"
    pd.read_parquet(path).assign(side="validation").to_parquet(path)
    assert evaluate_by_groups.main(["--output", str(tmp_path), "--device", "cpu"]) == 65
    assert "split.parquet is not the one that the run was trained with" in capsys.readouterr().err


def test_two_evaluations_at_once_leave_consistent_files(
    catalog: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    flags = ["--output", str(tmp_path), "--device", "cpu"]
    original = manifests.write_files

    def write_files(folder: manifests.Folder, files: Mapping[str, bytes]) -> list[FileEntry]:
        written = original(folder, files)
        monkeypatch.setattr(manifests, "write_files", original)
        assert run_command("fusion.all_embeddings.evaluate_by_groups", *flags, "--by", "category").code == 0
        return written

    monkeypatch.setattr(manifests, "write_files", write_files)
    assert evaluate_by_groups.main(flags) == 0
    assert verify.main([str(tmp_path / "runs/r")]) == 0


def test_remains_of_an_unfinished_checkpoint_are_removed(catalog: Path, tmp_path: Path) -> None:
    torn = tmp_path / "runs/r/checkpoints/step-00000002"
    torn.mkdir(parents=True)
    (torn / manifests.STATE).write_bytes(b"torn")
    assert train.main(flags(catalog, tmp_path)) == 0
    assert not torn.exists()


def test_a_diverged_loss_is_reported_even_if_the_store_is_unreachable(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = storage.write

    def write(url: str, data: bytes) -> None:
        if url.endswith(("log.txt", "exit.json")):
            raise UnreachableError(f"{url} does not answer", "wait")
        original(url, data)

    monkeypatch.setattr(storage, "write", write)
    more = ["--lr", "1e30", "--loss", "mse", "--clip", "1e30", "--epochs", "9"]
    assert train.main(flags(catalog, tmp_path, *more)) == 70
    said = capsys.readouterr().err
    assert "event=end_not_recorded" in said and "which is not finite at step" in said


def test_the_pointer_latest_names_the_run_that_began_last(catalog: Path, tmp_path: Path) -> None:
    for run_id, year in (("older", "2025"), ("newer", "2026")):
        assert train.main(flags(catalog, tmp_path, "--run-id", run_id, "--epochs", "1")) == 0
        edit(tmp_path / f"runs/{run_id}/run.json", started=f"{year}-01-01T00:00:00Z")
    assert train.main(flags(catalog, tmp_path, "--run-id", "older", "--epochs", "1")) == 0
    latest = pointers.read(RunPointer, str(tmp_path), "runs", "all_embeddings", "latest")
    assert latest is not None and latest.run_id == "newer"


@pytest.mark.parametrize("content", ["null", "{}", '{"run_id": "r", "checkpoint": "step-1", "smape": null}', "{"])
def test_a_damaged_pointer_is_replaced(
    content: str, catalog: Path, tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "pointers/runs/all_embeddings/best.json"
    path.write_text(content)
    assert train.main(flags(catalog, tmp_path)) == 0
    assert json.loads(path.read_text())["run_id"] == "r"
    assert "event=pointer_damaged" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["flip", "truncate", "no manifest"])
def test_a_damaged_checkpoint_is_skipped(
    damage: str,
    catalog: Path,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        stopped_at(patch, 12)
        assert train.main(flags(catalog, tmp_path)) == 75
    newest = RunFolder(str(tmp_path / "runs/r")).checkpoints()[-1]
    state = Path(newest.url, manifests.STATE)
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "no manifest":
        Path(newest.url, manifests.MANIFEST).unlink()
    else:
        state.write_bytes(content if damage == "flip" else content[:1000])
    capsys.readouterr()
    assert train.main(flags(catalog, tmp_path)) == 0
    said = capsys.readouterr().err
    assert ("event=checkpoint_damaged" in said) == (damage != "no manifest")
    assert "event=resumed" in said and newest.name not in said.split("event=resumed")[1].splitlines()[0]
    assert model_bytes(tmp_path) == model_bytes(undisturbed)


def test_an_older_attempt_cannot_publish(catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While this attempt trains, another one takes the lease."""
    original = checkpoint.commit

    def commit(run: RunFolder, *arguments: object) -> manifests.Checkpoint:
        take_lease(run)
        return original(run, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "commit", commit)
    assert train.main(flags(catalog, tmp_path)) == 78
    assert RunFolder(str(tmp_path / "runs/r")).checkpoints() == []
    assert not (tmp_path / "pointers").exists()


def test_the_lease_belongs_to_the_newest(bucket: str) -> None:
    first = take_lease(RunFolder(f"{bucket}/run"))
    first.check()
    second = take_lease(RunFolder(f"{bucket}/run"))
    assert (first.attempt, second.attempt) == (1, 2)
    second.check()
    with pytest.raises(SupersededError, match="attempt 2 of this run began while this one, 1"):
        first.check()


def test_two_jobs_at_once(catalog: Path, tmp_path: Path, undisturbed: Path) -> None:
    command = [sys.executable, "-m", "fusion.all_embeddings.train", *flags(catalog, tmp_path)]
    jobs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [job.communicate()[1] for job in jobs]
    codes = sorted(job.returncode for job in jobs)
    assert codes in ([0, 78], [0, 0]), said  # 0 twice: one had finished before the other looked
    assert model_bytes(tmp_path) == model_bytes(undisturbed)


def test_retention_keeps_the_newest_and_the_best(catalog: Path, tmp_path: Path) -> None:
    assert train.main(flags(catalog, tmp_path, "--keep", "1", "--checkpoint-steps", "1")) == 0
    left = RunFolder(str(tmp_path / "runs/r")).checkpoints()
    assert 1 <= len(left) <= 2
    assert left[-1].manifest.finished
    folders = {path.name for path in (tmp_path / "runs/r/checkpoints").iterdir()}
    assert folders == {made.name for made in left}


def test_fresh_refuses_a_run_that_exists(catalog: Path, tmp_path: Path, undisturbed: Path) -> None:
    assert train.main(flags(catalog, undisturbed, "--fresh")) == 78
    assert train.main(flags(catalog, tmp_path, "--fresh", "--epochs", "1")) == 0


def test_a_wrong_data_url_can_be_corrected(catalog: Path, tmp_path: Path) -> None:
    assert train.main(flags(tmp_path / "nothing", tmp_path)) == 65
    assert train.main(flags(catalog, tmp_path)) == 0
    assert json.loads((tmp_path / "runs/r/config.json").read_text())["data"] == str(catalog)
    assert predict_test.main(["--output", str(tmp_path)]) == 0


def test_changed_data_are_refused(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(catalog, data)
    with monkeypatch.context() as patch:
        stopped_at(patch, 6)
        assert train.main(flags(data, tmp_path)) == 75
    table = pd.read_csv(data / "train.csv")
    table.assign(price=table["price"] + 0.01).to_csv(data / "train.csv", index=False)
    assert train.main(flags(data, tmp_path)) == 65
    assert "the data have changed since run r began" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_real_signal_ends_with_75_and_a_checkpoint(number: signal.Signals, catalog: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fusion.all_embeddings.train", *flags(catalog, tmp_path, "--epochs", "10000")]
    command += ["--patience", "10000"]
    job = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not RunFolder(str(tmp_path / "runs/r")).checkpoints():
        time.sleep(0.05)
        assert job.poll() is None
    started = time.monotonic()
    job.send_signal(number)
    assert job.wait(30) == 75
    assert time.monotonic() - started < 10
    end = json.loads((tmp_path / "runs/r/attempts/1/exit.json").read_text())
    assert end["step"] == RunFolder(str(tmp_path / "runs/r")).checkpoints()[-1].manifest.step


SLOW_TO_SAVE = """
import sys, time
from fusion.training import saver
from fusion.all_embeddings import train

def save(self, wait=False):
    print("saving", file=sys.stderr, flush=True)
    time.sleep(1000)

saver.Saver._save = save
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_second_ctrl_c_does_not_wait_for_the_checkpoint(catalog: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW_TO_SAVE, *flags(catalog, tmp_path, "--epochs", "10000"), "--patience=10000"]
    with subprocess.Popen([*command, "--checkpoint-steps=0"], stderr=subprocess.PIPE, text=True) as job:
        try:
            assert job.stderr is not None
            for line in ("event=start", "saving"):
                assert any(line in said for said in job.stderr), job.wait(30)
                job.send_signal(signal.SIGINT)
            assert job.stderr.read() == "error: interrupted\nhint: run the same command again\n"
            assert job.wait(30) == 130
        finally:
            job.kill()
    assert json.loads((tmp_path / "runs/r/attempts/1/exit.json").read_text())["code"] == 130


def planned(ranks: int) -> list[Boundary]:
    """Returns one boundary for every second kind, at varying moments; 1 and 2 ranks together cover all kinds."""
    whens = {kind: [boundary for boundary in ALL if boundary.kind == kind] for kind in KINDS}
    return [choices[i % len(choices)] for i, choices in enumerate(list(whens.values())[ranks - 1 :: 2])]


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_anywhere_on_s3(ranks: int, bucket: str, catalog: Path) -> None:
    upload(catalog, f"{bucket}")
    wanted = planned(ranks)
    kills = len(wanted) + 3  # at random moments
    command = ["tests.chaos.kill_anywhere", "--data", bucket]
    command += ["--output", f"{bucket}/out", "--kills", str(kills), "--ranks", str(ranks), "--seed", "1"]
    command += ["--times", "1", "--at", *map(str, wanted)]
    done = fork_server.run(*command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    tally = json.loads(done.stdout.splitlines()[-1])
    assert tally["kills"] >= kills and tally["at random"] >= 3
    assert [boundary for boundary in wanted if not tally["boundaries"][boundary.kind].get(boundary.when)] == []


def test_the_planned_kills_cover_every_kind_of_boundary() -> None:
    both = [*planned(1), *planned(2)]
    assert sorted(boundary.kind for boundary in both) == sorted(KINDS)
    assert {boundary.when for boundary in both} == {"before", "inside", "after"}


def test_a_prediction_killed_before_its_pointer_is_repeated(catalog: Path, tmp_path: Path, undisturbed: Path) -> None:
    where = ["--run-dir", str(undisturbed / "runs/r"), "--output", str(tmp_path), "--date", "2026-01-02"]
    assert predict_test.main(where) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.csv")}
    storage.remove(str(tmp_path / "pointers"))
    assert predict_test.main(where) == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.csv")} == before
    assert (tmp_path / "pointers/submissions/test/current.json").exists()
