"""Starts a real Slurm on this machine for tests, with two nodes, accounting and preemption. Needs root and Debian.

The daemons are children of the test's process, use free ports on loopback, and write to one folder. Only the names of
the nodes are outside, in /etc/hosts. They contain the test's process id, so that several clusters can run at the same
time. They are removed at the end; after a killed test, the next start removes them.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fusion.launch.processes import _die_with
from tests.s3_server import _free_ports as free_ports

PACKAGES = ("slurm-wlm", "munge", "slurmdbd", "slurm-wlm-mysql-plugin", "mariadb-server")
PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacct")
NODES = tuple(f"fusion-{os.getpid()}-n{number}" for number in (1, 2))
HOSTS = Path("/etc/hosts")
HOSTS_LINE = f"127.0.0.1 {' '.join(NODES)}  # a test of fusion\n"
OF_PROCESS = re.compile(r"127\.0\.0\.1 fusion-(\d+)-n1 .*  # a test of fusion\n")
SBIN = "/usr/sbin:/sbin"

SLURM_CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired, by default two minutes; 5 s keep the tests short.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={slurmctld}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
LaunchParameters=disable_send_gids
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={slurmdbd}
AccountingStoragePass={folder}/munge.sock
JobAcctGatherType=jobacct_gather/linux
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
# Nodes may claim more cores than this machine has.
SlurmdParameters=config_overrides
ReturnToService=1
NodeName=DEFAULT CPUs={cpus} RealMemory=4000 State=UNKNOWN
NodeName={first} NodeHostname=localhost NodeAddr=127.0.0.1 Port={slurmd1}
NodeName={second} NodeHostname=localhost NodeAddr=127.0.0.1 Port={slurmd2} Feature=big
PartitionName=cheap Nodes=ALL DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL DefaultTime=10 PriorityTier=10 PreemptMode=OFF
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={slurmdbd}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={mariadb}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_accounting
CommitDelay=1
"""

DATABASE = """\
create user slurm@'127.0.0.1' identified by 'slurm';
create database slurm_accounting;
grant all on slurm_accounting.* to slurm@'127.0.0.1';
"""


def is_installed() -> bool:
    return all(shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") for name in PROGRAMS)


PATIENTLY = ("-o", "DPkg::Lock::Timeout=600", "-o", "Acquire::Retries=3")  # waits for other users of apt; retries


def install() -> bool:
    """Whether Slurm can be started. As root on Debian, tries to install it first."""
    if not is_installed() and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
            subprocess.run(["apt-get", *PATIENTLY, *command], check=False, capture_output=True, env=environment)
    return is_installed() and os.geteuid() == 0


class SlurmCluster:
    """A cluster that the constructor starts. `stop` ends its jobs and all of its processes."""

    def __init__(self, folder: Path, cpus: int = 4) -> None:
        self.folder = folder
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []
        names = ("slurmctld", "slurmdbd", "slurmd1", "slurmd2", "mariadb")
        self._ports = dict(zip(names, map(str, free_ports(len(names))), strict=True))
        facts = {"folder": folder, "cpus": cpus, "first": NODES[0], "second": NODES[1], **self._ports}
        (folder / "slurm.conf").write_text(SLURM_CONF.format(**facts))
        (folder / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**facts))
        (folder / "slurmdbd.conf").chmod(0o600)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:{SBIN}",
        }
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def run(self, *command: str) -> str:
        """Runs one of Slurm's commands; returns its output."""
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=self.environment)
        assert done.returncode == 0, f"{command}: {done.stderr}{self._logs()}"
        return done.stdout.strip()

    def stop(self) -> None:
        if any(name == "slurmctld" for name, _ in self._processes):
            subprocess.run(["scancel", "--user=root"], check=False, env=self.environment)
            _wait(lambda: not self.run("squeue", "--noheader"), "jobs to end", 90, self._logs)
        for _, process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        _name_nodes("")

    def _start(self) -> None:
        _name_nodes(HOSTS_LINE)
        self._start_munge()
        self._start_database()
        self._spawn("slurmdbd", "-D")
        _wait(lambda: self._succeeds("sacctmgr", "-n", "show", "cluster"), "slurmdbd", 120, self._logs)
        self.run("sacctmgr", "-i", "add", "cluster", "test")
        self.run("sacctmgr", "-i", "add", "qos", "high")
        (self.folder / "state").mkdir()
        self._spawn("slurmctld", "-D", "-c")
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
            self._spawn("slurmd", "-D", "-N", node)
        idle = ("sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", "--format=%N")
        _wait(lambda: len(self._output(*idle).split()) == len(NODES), "the nodes", 120, self._logs)

    def _start_munge(self) -> None:
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        places = {"socket": "munge.sock", "key-file": key.name, "pid-file": "munge.pid"}
        places |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        # --force, because munge refuses parent folders that others can write, as those of tests may be
        self._spawn("munged", "--foreground", "--force", *(f"--{k}={self.folder / v}" for k, v in places.items()))
        _wait((self.folder / "munge.sock").exists, "munged", 120, self._logs)

    def _start_database(self) -> None:
        data = self.folder / "mysql"
        common = [
            "--no-defaults",
            "--user=root",
            f"--datadir={data}",
        ]  # as root, because no other user can read the folders of tests
        self.run("mariadb-install-db", *common, "--auth-root-authentication-method=socket", "--skip-test-db")
        socket = f"--socket={data}/sock"
        self._spawn("mariadbd", *common, socket, f"--pid-file={data}/pid", "--bind-address=127.0.0.1",
            f"--port={self._ports['mariadb']}", "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=32M",
            "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0", "--skip-log-bin")  # fmt: skip
        _wait(lambda: self._succeeds("mariadb", "--no-defaults", socket, "-e", "select 1"), "mariadb", 120, self._logs)
        self.run("mariadb", "--no-defaults", socket, "-e", DATABASE)

    def _spawn(self, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=self.environment["PATH"])
        assert path
        with (self.folder / f"{program}-{len(self._processes)}.log").open("wb") as log:
            # The kernel kills the daemon when the process of the tests ends, however that ends.
            bond = partial(_die_with, os.getpid())
            command = [path, *arguments]
            process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, preexec_fn=bond)  # noqa: PLW1509
        self._processes.append((program, process))

    def _succeeds(self, *command: str) -> bool:
        return subprocess.run(command, check=False, capture_output=True, env=self.environment).returncode == 0

    def _output(self, *command: str) -> str:
        return subprocess.run(command, check=False, capture_output=True, text=True, env=self.environment).stdout

    def _logs(self) -> str:
        return "\n".join(f"{log.name}:\n{log.read_text()[-1500:]}" for log in sorted(self.folder.glob("*.log")))


def _name_nodes(line: str) -> None:
    """Adds a line to /etc/hosts, and removes this process's earlier line and those of processes that have ended."""
    with HOSTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # other tests may do the same at the same time
        lines = file.read().replace(HOSTS_LINE, "").splitlines(keepends=True)
        found = [(one, OF_PROCESS.fullmatch(one)) for one in lines]
        kept = [one for one, process in found if not process or Path(f"/proc/{process[1]}").exists()]
        file.seek(0)
        file.write("".join(kept) + line)
        file.truncate()


def _wait(condition: Callable[[], bool], what: str, seconds: float, logs: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s\n{logs()}"
        time.sleep(0.1)
