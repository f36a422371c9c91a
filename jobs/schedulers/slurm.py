"""Jobs on Slurm, through submitit: it renders `#SBATCH`, submits, names the logs and follows the state by sacct.

What runs is a plain command in a script that anyone can read, never a pickled function: one srun task per node, which
is the launcher, which starts a rank per GPU. Several jobs become one array.
"""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Sequence
from pathlib import Path

from submitit import SlurmExecutor, SlurmJob
from submitit.core.utils import FailedJobError

from fusion.errors import ConfigError, UnreachableError
from jobs.schedulers.description import Job
from jobs.schedulers.slurm_settings import Cluster

# Exit codes after which the job is not queued again. 1: Python has no Fusion; 2: there is no such Python; 13: it must
# not be run; 70: a bug, which is not worth another wait in the queue; the others need a person to correct something.
FINAL = (0, 1, 2, 13, 64, 65, 70, 75, 77, 78)
TRIES = 3

# What sbatch says when its controller is away, restarts or has too much to do; its exit code is 1 for every error.
NO_ANSWER = (
    "contact slurm controller", "configuration source", "Socket timed out", "Zero Bytes were transmitted",
    "Connection refused", "temporarily unable to accept job",
)  # fmt: skip

# Launchers of several nodes tell each other how their ranks ended and all end alike, a moment apart. With
# --kill-on-bad-exit srun would kill the second one in that moment, and end with 143 in place of the job's own code.
# --wait ends what is left when a launcher is gone without a word.
SRUN = ("--kill-on-bad-exit=0", "--wait=60", "--open-mode=append")

SETUP = """\
failed() { echo "error: the setup failed at: $1"; echo "hint: correct the settings of the cluster"; exit 78; }
# Nothing of the submitting shell is here (--export=NONE). What is set from here on reaches the steps.
export SLURM_EXPORT_ENV=ALL"""

DEVICE = "export FUSION_DEVICE=cuda  # a node or a build of torch without GPUs ends the job with 78"

# Slurm sends stop signals (`scancel --signal`, the time limit, preemption) to the steps of a job and not to its shell:
# one that came while no launcher runs, or before it listens, would be lost. So a step of the job's whole length runs
# nothing but `sleep`, which any stop signal ends. To the shell Slurm sends SIGTERM, when it ends the job itself:
# cancelled, out of time, or requeued. Others come there by `scancel --batch` and `--full`.
LISTEN = """\
ended=
stopping=
trap 'ended=yes' TERM
trap 'stopping=yes' USR1 USR2 HUP INT
srun --overlap --nodes=1 --ntasks=1 --input=none --output=/dev/null sleep infinity 2> /dev/null &
listener=$!
trap 'kill $listener 2> /dev/null' EXIT
# Whether to stop. A signal ends the listener with more than 128; 1 means that its step could not be started.
stop_asked() {
  kill -0 $listener 2> /dev/null || wait $listener || [ $? -le 128 ] || stopping=yes
  [ -n "$stopping$ended" ]
}"""

TRY = """\
code=75
for try in {tries}; do
stop_asked && break"""

TEARDOWN = """\
code=$?
case $code in {final}) break ;; esac
sleep 3  # the listener's end may be heard of a moment after the launcher's
stop_asked && break
if [ $try -lt {n_tries} ]; then
  echo "try $try of {n_tries} ended with $code: again in $((10 * try)) s"
  for ((second = 0; second < 10 * try; second++)); do stop_asked || sleep 1; done
fi
done
case $code in
  {final}) ;;
  *) stop_asked && [ -z "$ended" ] && code=75 ;;  # asked to stop, and would have been tried again: later
esac
if [ $code -eq 75 ] && [ -z "$ended" ]; then
  # Stopped on request with a committed checkpoint: goes on from there in the queue's next turn.
  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_requeues} ]; then
    id=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}}}
    echo "stopped on request, requeued: time $((${{SLURM_RESTART_COUNT:-0}} + 1)) of at most {max_requeues}"
    for ((attempt = 0; attempt < 6; attempt++)); do
      if scontrol requeue "${{id:-$SLURM_JOB_ID}}"; then
        sleep 60  # until Slurm ends this shell
        exit $code
      fi
      sleep 5  # Slurm's controller may be about to restart; signal_seconds leave half a minute for that
    done
  fi
  echo "error: stopped on request, and not requeued after ${{SLURM_RESTART_COUNT:-0}} requeues"
  echo "hint: submit it again, which goes on from the last checkpoint, or allow more with --max-requeues"
fi
exit $code"""


class Executor(SlurmExecutor):
    """Submits commands as they are. Renders also where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def render(jobs: Sequence[Job], cluster: Cluster, max_requeues: int) -> str:
    """The script that sbatch gets."""
    executor, command = _executor(jobs, cluster, max_requeues)
    return executor._make_submission_file_text(command, uid="") + "\n"


def submit(jobs: Sequence[Job], cluster: Cluster, max_requeues: int) -> list[str]:
    """Submits and tells where the logs will be; ids of the jobs, one each.

    Raises:
        ConfigError: sbatch refuses the job.
        UnreachableError: there is no sbatch here, or Slurm's controller does not answer.
    """
    executor, command = _executor(jobs, cluster, max_requeues)
    try:
        executor.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            job = executor._submit_command(command)
    except FileNotFoundError as error:
        raise UnreachableError("there is no sbatch here", "submit from a login node of the cluster") from error
    except FailedJobError as error:
        raise _refusal(str(error)) from error
    ids = [job.job_id] if len(jobs) == 1 else [f"{job.job_id}_{index}" for index in range(len(jobs))]
    for number, one in zip(ids, jobs, strict=True):
        print(f"submitted {number} {one.name}, log: {log_in(cluster.folder, number)}", flush=True)
    return ids


def log_in(folder: str, job_id: str) -> Path:
    """Log of the first node of a job sent from that folder; other nodes have their number in place of the 0."""
    return SlurmJob[None](folder, job_id).paths.stdout


def _refusal(said: str) -> Exception:
    first = said.strip().splitlines()[0] if said.strip() else "sbatch failed without a word"
    if any(words in said for words in NO_ANSWER):
        remedy = "look at squeue whether the job is there, and try again when Slurm's controller is back"
        return UnreachableError(f"Slurm does not answer: {first}", remedy)
    return ConfigError(
        f"Slurm refuses the job: {first}", "correct the settings of the cluster, or what the job asks for"
    )


def _executor(jobs: Sequence[Job], cluster: Cluster, max_requeues: int) -> tuple[Executor, str]:
    first, names = jobs[0], {job.name for job in jobs}
    executor = Executor(cluster.folder)
    executor.update_parameters(
        job_name=first.name if len(names) == 1 else f"fusion-{first.task}",
        nodes=first.nodes,
        ntasks_per_node=1,
        stderr_to_stdout=True,
        wckey=None,
        setup=_setup(jobs, cluster),
        srun_args=[*SRUN, f"--cpus-per-task={cluster.cpus_per_node}", *cluster.container(), *cluster.srun],
        teardown=_teardown(max_requeues),
        **cluster.parameters(first.task, first.gpus_per_node),
    )
    if len(jobs) > 1:
        executor.parameters["map_count"] = len(jobs)
        return executor, '"${command[@]}"'
    return executor, shlex.join(first.command(cluster.python))


def _setup(jobs: Sequence[Job], cluster: Cluster) -> list[str]:
    lines = [SETUP, LISTEN, *(f"export {name}={shlex.quote(value)}" for name, value in cluster.exports().items())]
    if cluster.n_gpus(jobs[0].task, jobs[0].gpus_per_node) and "--device" not in jobs[0].flags:
        lines += [DEVICE]
    # eval: a comment, a backslash or an open quote that ends a line is no part of what follows it.
    lines += [f"eval {shlex.quote(line)} || failed {shlex.quote(line)}" for line in cluster.lines()]
    if jobs[0].nodes > 1:
        lines += [
            "export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))  # jobs that share a node meet at ports of their own"
        ]
    if len(jobs) > 1:
        lines += ["case $SLURM_ARRAY_TASK_ID in"]
        lines += [f"{index}) command=({shlex.join(job.command(cluster.python))}) ;;" for index, job in enumerate(jobs)]
        lines += ["esac"]
    return [*lines, TRY.format(tries=" ".join(map(str, range(1, TRIES + 1))))]


def _teardown(max_requeues: int) -> list[str]:
    final = " | ".join(map(str, FINAL))
    return [TEARDOWN.format(final=final, n_tries=TRIES, max_requeues=max_requeues)]
