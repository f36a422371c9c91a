"""Checks of the machine: memory, folders, limits, libraries, GPUs, and whether the nodes of a job find each other."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import fusion
from fusion.environment import memory_limit, variable
from fusion.errors import ExitCode
from fusion.jobs.checks.check import CheckResult, PlannedJob, fail, ok, size, warn
from fusion.storage.scratch import temporary_folder

SHM = Path("/dev/shm")
# 1 GiB, for /dev/shm and for temporary folders: NCCL takes tens of MiB in /dev/shm per GPU of a node, and caches of
# compiled kernels take hundreds. With less a job may still run, so less is a warning.
MIN_FREE_BYTES = 2**30
# The usual soft limit on Linux. Ten threads that fetch, connections between ranks and Parquet readers stay far below
# it; with a lower limit a job may end with "Too many open files".
MIN_OPEN_FILES = 1024
TORCH_TIMEOUT = 120.0  # seconds; loading torch takes 5, and 60 from a cold network disk
SOON = 600  # seconds; a Slurm job with less time left than this gets a warning
LAUNCHER_GRACE = 60.0  # seconds; the default of fusion.launch --grace, which a test compares with this
CACHES = ("HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR")
_PROBE_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda and torch.distributed.is_nccl_available() else None
print(json.dumps([torch.__version__, torch.version.cuda, torch.cuda.device_count() if cuda else 0, nccl]))
"""


def libraries(_: PlannedJob) -> CheckResult:
    """Checks that Python and every library have a version that Fusion supports."""
    try:
        about = metadata.metadata("fusion")
    except metadata.PackageNotFoundError:
        folder = Path(fusion.__file__).parents[1]
        return ok(
            f"fusion {fusion.__version__} runs from {folder} without being installed, so that the required versions of "
            "libraries are not known"
        )
    needed = [Requirement(text) for text in metadata.requires("fusion") or ()]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = [text for one in needed if (text := _mismatch(one.name, one.specifier, _version(one.name)))]
    python = _mismatch("Python", SpecifierSet(about["Requires-Python"] or ""), platform.python_version())
    wrong = [python, *wrong] if python else wrong
    if wrong:
        to_do = "install Fusion again in this environment: `pip install .`"
        return fail("; ".join(wrong), to_do, ExitCode.CONFIG)
    return ok(f"fusion {about['Version']}, Python {platform.python_version()}, {len(needed)} libraries as required")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _mismatch(name: str, needed: SpecifierSet, found: str | None) -> str:
    if found is None:
        return f"{name} is not installed, expected {needed}"
    return "" if needed.contains(found, prereleases=True) else f"{name} is {found}, expected {needed}"


def gpus(job: PlannedJob) -> CheckResult | None:
    """Checks the GPUs and their driver by means of nvidia-smi; does not apply where the job uses the CPU."""
    device = job.settings.device
    if device == "cpu":
        return None
    try:
        listed = _nvidia_smi()
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return fail(f"nvidia-smi does not work ({error})", "fix the driver, or ask for another node", ExitCode.CONFIG)
    if not listed and device != "auto":
        return fail(
            f"no GPU, and FUSION_DEVICE is {device}", "ask for a GPU, or set FUSION_DEVICE=cpu", ExitCode.CONFIG
        )
    if not listed:
        return warn("no GPU: the job computes on the CPU", "ask the cluster for a GPU, or set FUSION_DEVICE=cpu")
    names = sorted({one["name"] for one in listed})
    found = f"{len(listed)} x {' and '.join(names)}, driver {listed[0]['driver_version']}"
    busy = [
        f"GPU {one['index']} has {one['memory.used']} of {one['memory.total']} MiB in use"
        for one in listed
        if _is_busy(one["memory.used"], one["memory.total"])
    ]
    if busy:
        return warn(f"{found}; {', '.join(busy)}", "see which processes use it: `nvidia-smi`")
    return ok(found)


def _is_busy(used: str, total: str) -> bool:
    """Whether another process seems to use the GPU: more than a tenth of its memory is in use.

    The driver itself holds some hundred MiB of an idle GPU, which is below a tenth of any GPU with 8 GiB or more.

    Args:
        used, total: memory in MiB as nvidia-smi prints it; "[N/A]" where a GPU shares the memory of the CPU.
    """
    are_numbers = used.replace(".", "").isdecimal() and total.replace(".", "").isdecimal()
    return are_numbers and float(used) > 0.1 * float(total)


def _nvidia_smi() -> list[dict[str, str]]:
    """One row per GPU, empty where there is no nvidia-smi; raises ValueError when its output is not such a table."""
    if not shutil.which("nvidia-smi"):
        return []
    names = ["index", "name", "driver_version", "memory.used", "memory.total"]
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    rows = [line.split(", ") for line in done.stdout.splitlines() if line]
    if any(len(row) != len(names) for row in rows):
        raise ValueError(f"it printed {done.stdout.splitlines()[0]!r}")
    return [dict(zip(names, row, strict=True)) for row in rows]


def _has_gpus() -> bool:
    try:
        return bool(_nvidia_smi())
    except (OSError, subprocess.SubprocessError, ValueError):  # which the check `gpus` reports
        return False


def torch(job: PlannedJob) -> CheckResult:
    """Checks that torch loads and finds the GPUs, and reports its NCCL. A subprocess loads torch, with a timeout."""
    if not find_spec("torch"):
        return warn("torch is not installed: only the commands of jobs/ work here", "install torch where jobs run")
    command = [sys.executable, "-c", _PROBE_TORCH]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TORCH_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        to_do = "check the disk that torch is installed on, and the driver: `nvidia-smi`"
        return fail(f"torch did not load within {TORCH_TIMEOUT:g} s", to_do, ExitCode.CONFIG)
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return fail(f"torch cannot be loaded ({cause})", "install torch again", ExitCode.CONFIG)
    version, cuda, n_devices, nccl = json.loads(done.stdout)
    if not n_devices and job.settings.device != "cpu" and _has_gpus():
        to_do = "install a build of torch for this driver, or a newer driver"
        return fail(f"torch {version} (CUDA {cuda}) finds none of the GPUs", to_do, ExitCode.CONFIG)
    if not n_devices:
        return ok(f"torch {version}, on the CPU")
    return ok(f"torch {version}, CUDA {cuda}, NCCL {nccl}, {n_devices} GPUs")


def shared_memory(_: PlannedJob) -> CheckResult:
    """Checks the size of /dev/shm, through which NCCL moves data between the GPUs of a node, and that it is writable.

    On Kubernetes a memory-backed emptyDir counts towards the memory limit of the pod, so that one as large as the limit
    would let the pod run out of memory before the folder is full.
    """
    to_do = "mount a larger one: a memory-backed emptyDir on Kubernetes, --shm-size=1g with Docker or Podman"
    if not SHM.is_dir():
        return warn(f"there is no {SHM}", to_do)
    if cause := _write_error(SHM):
        to_do = "mount one that this user can write: NCCL and the ranks of a node share data there"
        return warn(f"{SHM} cannot be written ({cause})", to_do)
    total, _used, free = shutil.disk_usage(SHM)
    found, limit = f"{SHM} has {size(total)}, {size(free)} free", memory_limit()
    if total < MIN_FREE_BYTES or free < total / 10:  # nearly full: another job of this node may have left files there
        return warn(found, to_do)
    if limit and total >= limit:
        return warn(
            f"{found}; the memory limit, which it counts towards, is {size(limit)}", "give it a smaller sizeLimit"
        )
    return ok(found)


def memory(_: PlannedJob) -> CheckResult:
    """Reports how much memory this job may use, and warns if it may open few files."""
    limit, total = memory_limit(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    n_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    found = f"{size(limit)} by the cgroup's limit" if limit else f"{size(total)}, no limit by a cgroup"
    found += f"; {n_files} open files"
    if 0 <= n_files < MIN_OPEN_FILES:
        return warn(found, f"allow {MIN_OPEN_FILES} open files or more: `ulimit -n`")
    return ok(found)


def folders(_: PlannedJob) -> CheckResult:
    """Checks that temporary files and caches can be written, and that there is space for them."""
    free: dict[str, int] = {}
    for name, folder in {"TMPDIR": temporary_folder(), **_caches()}.items():
        there = _nearest_existing(Path(folder).absolute())
        if cause := _write_error(there):
            to_do = f"mount a writable volume there, or set {name} to a folder that can be written"
            return fail(f"{folder} ({name}) cannot be written: {cause}", to_do, ExitCode.CONFIG)
        free[folder] = shutil.disk_usage(there).free
    found = ", ".join(f"{folder} {size(n_bytes)} free" for folder, n_bytes in free.items())
    if min(free.values()) < MIN_FREE_BYTES:
        return warn(found, "free some space: compiled kernels and logs need it")
    return ok(found)


def _caches() -> dict[str, str]:
    return {name: folder for name in CACHES if (folder := variable(name))}


def _write_error(folder: Path) -> str:
    """Why no file can be written to the folder; empty when one can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"probe")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _nearest_existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    # os.path.exists, because Path.exists raises PermissionError below folders of other users.
    return next(parent for parent in [folder, *folder.parents] if os.path.exists(parent))


def names(_: PlannedJob) -> CheckResult:
    """Checks that the names of this machine and of the first node resolve."""
    own, master = socket.gethostname(), variable("MASTER_ADDR", "PET_MASTER_ADDR")
    if n_nodes() > 1 and not master and not variable("SLURM_STEP_NODELIST"):
        to_do = "set MASTER_ADDR to the name of node 0"
        return fail(f"{n_nodes()} nodes, and MASTER_ADDR is not set", to_do, ExitCode.CONFIG)
    if master and not _resolves(master):
        to_do = "use a name that every node resolves, such as the pod's of a headless Service"
        return fail(f"MASTER_ADDR {master} does not resolve", to_do, ExitCode.CONFIG)
    # Only a warning: a job on one node connects to 127.0.0.1.
    if not _resolves(own):
        return warn(f"this machine's own name {own} does not resolve", f"add `127.0.0.1 {own}` to /etc/hosts")
    return ok(f"{own} resolves" + (f", and so does MASTER_ADDR {master}" if master else ""))


def _resolves(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except (OSError, UnicodeError):
        return False


def cluster(_: PlannedJob) -> CheckResult:
    """Reports which scheduler runs this job, and warns when Slurm ends it soon."""
    env = os.environ
    if "SLURM_JOB_ID" in env:
        return _slurm(env)
    if "KUBERNETES_SERVICE_HOST" in env:
        index = env.get("JOB_COMPLETION_INDEX")
        return ok(f"Kubernetes, pod {socket.gethostname()}" + (f", index {index}" if index else ""))
    return ok("neither Kubernetes nor Slurm: this machine alone")


def _slurm(env: Mapping[str, str]) -> CheckResult:
    found = f"Slurm job {env['SLURM_JOB_ID']}, {n_nodes()} nodes"
    end = env.get("SLURM_JOB_END_TIME", "")
    if not end.isdecimal():
        return ok(found)
    left = int(end) - time.time()
    if left < SOON:
        return warn(f"{found}, which ends in {left:.0f} s", "give the job more --time")
    return ok(f"{found}, which ends in {left / 60:.0f} min")


def n_nodes() -> int:
    """The number of nodes of this job, from the variables of torchrun (PET_NNODES) or Slurm; 1 without them."""
    text = variable("PET_NNODES", "SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES") or "1"
    return int(text) if text.isdecimal() else 1


def grace(job: PlannedJob) -> CheckResult:
    """Checks that training does not plan to take longer for a stop than its launcher allows (see FUSION_GRACE)."""
    seconds = job.settings.grace
    if seconds > LAUNCHER_GRACE:
        found = f"FUSION_GRACE is {seconds:g} s, and fusion.launch kills its ranks after {LAUNCHER_GRACE:g} s"
        to_do = (
            f"unset FUSION_GRACE, or start fusion.launch with --grace {seconds:g} and let the cluster wait longer than "
            "that before it kills the job"
        )
        return warn(found, to_do)
    return ok(f"training takes at most {seconds:g} s to stop, and fusion.launch allows {LAUNCHER_GRACE:g} s")
