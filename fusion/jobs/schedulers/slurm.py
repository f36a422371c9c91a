"""Submits jobs to Slurm by means of submitit, which renders the `#SBATCH` lines, calls sbatch and names the logs.

The batch script runs a plain command and not, as usual with submitit, a pickled function. srun starts one task per
node: the launcher, which starts one rank per GPU. Several jobs become one job array.
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
from fusion.jobs.schedulers.description import Job
from fusion.jobs.schedulers.slurm_settings import Cluster

# Exit codes after which the command is not tried again. 0: done. 1: Python cannot import Fusion. 2: there is no such
# Python. 13: it may not be executed. 64, 65, 77, 78: the user must correct something. 70: a bug, which would occur
# again. 75: stopped on request; the job is requeued instead.
FINAL_CODES = (0, 1, 2, 13, 64, 65, 70, 75, 77, 78)
TRIES = 3  # of the command within one start of the job, against errors that pass, such as an unreachable store

# What sbatch prints when Slurm's controller is down, restarting or overloaded. Its exit code is 1 for every error.
UNREACHABLE = (
    "contact slurm controller", "configuration source", "Socket timed out", "Zero Bytes were transmitted",
    "Connection refused", "temporarily unable to accept job",
)  # fmt: skip

# The launchers of several nodes inform each other how their ranks ended, and all end with the same code, but not at the
# same instant. With --kill-on-bad-exit srun would kill the later ones, and end with 143 instead of the job's own code.
# --wait kills the other launchers 60 s after the first has ended, in case that one could not inform them.
SRUN = ("--kill-on-bad-exit=0", "--wait=60", "--open-mode=append")

SETUP = """\
failed() { echo "error: the setup failed at: $1"; echo "hint: correct the settings of the cluster"; exit 78; }
# The job has no variables of the submitting shell (--export=NONE). Variables that are set from here on reach the steps.
export SLURM_EXPORT_ENV=ALL"""

DEVICE = "export FUSION_DEVICE=cuda  # a job that finds no GPU ends with 78 and does not use the CPU"

# Slurm sends stop signals (`scancel --signal`, the time limit, preemption) to the steps of a job and not to its shell.
# A signal that comes while no launcher runs, or before it has a handler, would be lost. Therefore another step, the
# listener, runs `sleep` for as long as the job lasts: a stop signal ends it, and the shell sees that. The shell itself
# gets SIGTERM when Slurm ends the job (cancelled, out of time, or requeued), and other signals by `scancel --batch` and
# `--full`.
LISTEN = """\
ended=
stopping=
trap 'ended=yes' TERM
trap 'stopping=yes' USR1 USR2 HUP INT
srun --overlap --nodes=1 --ntasks=1 --input=none --output=/dev/null sleep infinity 2> /dev/null &
listener=$!
trap 'kill $listener 2> /dev/null' EXIT
# Succeeds if the job was asked to stop. A signal ends the listener with a code above 128; 1 means that its step could
# not be started.
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
sleep 3  # the shell may see the end of the listener a moment after that of the launcher
stop_asked && break
if [ $try -lt {n_tries} ]; then
  echo "try $try of {n_tries} ended with $code: next try in $((10 * try)) s"
  for ((second = 0; second < 10 * try; second++)); do stop_asked || sleep 1; done
fi
done
case $code in
  {final}) ;;
  *) stop_asked && [ -z "$ended" ] && code=75 ;;  # a code that is tried again: after the requeue
esac
# Slurm marks a job that is cancelled, then ends its steps, and this shell after them.
cancelled() {{ [ "$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID" 2> /dev/null)" = COMPLETING ]; }}
# The signal that ends this shell also ends squeue, which then has not answered: hence `ended` is read once more.
if [ $code -eq 75 ] && [ -z "$ended" ] && ! cancelled && [ -z "$ended" ]; then
  # Stopped on request with a committed checkpoint. The job is requeued, and resumes from the checkpoint.
  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_requeues} ]; then
    id=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}}}
    echo "stopped on request, requeued: requeue $((${{SLURM_RESTART_COUNT:-0}} + 1)) of at most {max_requeues}"
    for ((attempt = 0; attempt < 6; attempt++)); do
      if scontrol requeue "${{id:-$SLURM_JOB_ID}}"; then
        sleep 60  # until Slurm ends this shell
        exit $code
      fi
      sleep 5  # Slurm's controller may be restarting; signal_seconds leaves 30 s for these attempts
    done
  fi
  echo "error: stopped on request, and not requeued after ${{SLURM_RESTART_COUNT:-0}} requeues"
  echo "hint: submit the job again to resume from the last checkpoint, or allow more with --max-requeues"
fi
exit $code"""


class Executor(SlurmExecutor):
    """A SlurmExecutor that can be created on machines without Slurm, to render scripts."""

    @classmethod
    def affinity(cls) -> int:
        return 2  # submitit raises an error for an executor with -1, which SlurmExecutor returns where srun is missing


def render(jobs: Sequence[Job], cluster: Cluster, max_requeues: int) -> str:
    """The batch script that is sent to sbatch."""
    executor, command = _executor(jobs, cluster, max_requeues)
    return executor._make_submission_file_text(command, uid="") + "\n"


def submit(jobs: Sequence[Job], cluster: Cluster, max_requeues: int) -> list[str]:
    """Submits the jobs and prints where their logs will be; returns their ids.

    Raises:
        ConfigError: sbatch refuses the job.
        UnreachableError: there is no sbatch here, or Slurm's controller does not answer.
    """
    executor, command = _executor(jobs, cluster, max_requeues)
    try:
        executor.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stderr(io.StringIO()):  # submitit also prints the error that it raises
            job = executor._submit_command(command)
    except FileNotFoundError as error:
        raise UnreachableError("there is no sbatch here", "submit from a login node of the cluster") from error
    except FailedJobError as error:
        raise _submission_error(str(error)) from error
    ids = [job.job_id] if len(jobs) == 1 else [f"{job.job_id}_{index}" for index in range(len(jobs))]
    for number, one in zip(ids, jobs, strict=True):
        print(f"submitted {number} {one.name}, log: {log_in(cluster.folder, number)}", flush=True)
    return ids


def log_in(folder: str, job_id: str) -> Path:
    """The log of a job's first node, in the folder of the logs; other nodes have their number in place of the 0."""
    return SlurmJob[None](folder, job_id).paths.stdout


def _submission_error(said: str) -> Exception:
    """The error for the message that sbatch failed with."""
    first = said.strip().splitlines()[0] if said.strip() else "sbatch failed without a message"
    if any(words in said for words in UNREACHABLE):
        remedy = (
            "check with `squeue -u $USER` whether the job was submitted, and try again when Slurm's controller is back"
        )
        return UnreachableError(f"Slurm does not answer: {first}", remedy)
    return ConfigError(
        f"Slurm refuses the job: {first}", "correct the settings of the cluster, or what the job asks for"
    )


def _executor(jobs: Sequence[Job], cluster: Cluster, max_requeues: int) -> tuple[Executor, str]:
    """The executor with all parameters of the batch script, and the command that srun starts in it."""
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
    """Lines of the batch script before the command."""
    lines = [SETUP, LISTEN, *(f"export {name}={shlex.quote(value)}" for name, value in cluster.exports().items())]
    if cluster.n_gpus(jobs[0].task, jobs[0].gpus_per_node) and "--device" not in jobs[0].flags:
        lines += [DEVICE]
    # eval keeps a comment, a backslash or an open quote at the end of a line from affecting the `|| failed` after it.
    lines += [f"eval {shlex.quote(line)} || failed {shlex.quote(line)}" for line in cluster.setup_lines()]
    if jobs[0].nodes > 1:
        lines += [
            "export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))  # so that jobs on the same node use different ports"
        ]
    if len(jobs) > 1:
        lines += ["case $SLURM_ARRAY_TASK_ID in"]
        lines += [f"{index}) command=({shlex.join(job.command(cluster.python))}) ;;" for index, job in enumerate(jobs)]
        lines += ["esac"]
    return [*lines, TRY.format(tries=" ".join(map(str, range(1, TRIES + 1))))]


def _teardown(max_requeues: int) -> list[str]:
    """Lines of the batch script after the command."""
    final = " | ".join(map(str, FINAL_CODES))
    return [TEARDOWN.format(final=final, n_tries=TRIES, max_requeues=max_requeues)]
