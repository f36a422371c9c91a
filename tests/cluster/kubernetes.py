"""Starts a Kubernetes of one node as processes: API server, controllers, scheduler, kubelet and containerd.

The binaries are in the folder that FUSION_KUBERNETES names; `k8s/README.md` says how to build them. It needs root. The
processes listen on loopback and on a network bridge of their own, and write below one folder.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

from tests.cluster import access
from tests.cluster.one_layer import one_layer
from tests.cluster.services import Service, free_ports, succeeds, until
from tests.manifests import KUBECTL

NODE = "localhost"  # a name that the API server can resolve on every machine
BRIDGE, SUBNET, NETWORK = "fusion0", "10.213.7", "fusion-tests"
COMPONENTS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet")
PAUSE = "localhost/pause:3"
N_GPUS = 8  # that the node claims to have, so that pods that request GPUs are scheduled
CGROUPS = Path("/sys/fs/cgroup")


class Kubernetes:
    """The cluster in a folder. Only the process that made the folder may call `start` and `stop`."""

    def __init__(self, folder: Path, binaries: Path) -> None:
        self.folder, self.binaries = folder, binaries
        self.socket = folder / "containerd.sock"
        self.kubeconfig = folder / "pki" / "admin.conf"

    def start(self, images: Sequence[Callable[[], None]] = ()) -> None:
        """Starts all processes. In parallel, each function in `images` loads an image into the node with `load`."""
        ports = free_ports(4)
        self._start_containerd()
        with ThreadPoolExecutor() as pool:
            brought = [pool.submit(bring) for bring in images]
            self._start_cluster(ports)
        for one in brought:
            one.result()

    def _start_cluster(self, ports: list[int]) -> None:
        self._unpack("kubernetes", "etcd", "coredns", "pause")
        self.load(one_layer(self.folder / "pause.tar", PAUSE, {"pause": self.unpacked("pause")}))
        access.make(self.folder / "pki", f"https://127.0.0.1:{ports[2]}")
        self._start_control_plane(*ports)
        self._start_kubelet(ports[3])
        self._start_name_server()
        until(lambda: self.answers("wait", "--for=condition=Ready", f"node/{NODE}", "--timeout=1s"), "a ready node")
        until(lambda: self.answers("get", "serviceaccount", "default"), "the controllers")
        self._offer_gpus()

    def service(self, name: str) -> Service:
        return Service(self.folder, name)

    def kubectl(self, *arguments: str, text: str | None = None) -> str:
        command = [KUBECTL, f"--kubeconfig={self.kubeconfig}", *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, input=text).stdout

    def ctr(self, *arguments: str | Path) -> list[str | Path]:
        return ["ctr", "--address", self.socket, "--namespace", "k8s.io", *arguments]

    def load(self, archive: Path | IO[bytes]) -> None:
        """Loads the images of an archive, given as a file or a pipe, into the node."""
        source = archive.open("rb") if isinstance(archive, Path) else archive
        with source:
            subprocess.run(self.ctr("images", "import", "-"), check=True, stdin=source, stdout=subprocess.DEVNULL)

    def kill(self, container: str) -> None:
        """Kills a container with SIGKILL, from outside: processes inside cannot do that to its first process."""
        subprocess.run(self.ctr("tasks", "kill", "--signal=SIGKILL", container), check=True)

    def unpacked(self, name: str) -> Path:
        """The path of a binary, which is unpacked if it is packed as .xz."""
        made, packed = self.folder / "bin" / name, self.binaries / f"{name}.xz"
        if not made.exists():
            made.parent.mkdir(exist_ok=True)
            if packed.exists():
                with lzma.open(packed) as source, made.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            else:
                shutil.copy(self.binaries / name, made)
            made.chmod(0o755)
        return made

    def stop(self) -> None:
        """Ends all processes, pods included. On this machine only the folder with the logs remains."""
        for name in ("kueue", "jobset", "coredns", "scheduler", "controllers"):
            self.service(name).stop()
        self._end_pods()
        for name in ("apiserver", "etcd", "containerd"):
            self.service(name).stop()
        _unmount(self.folder)
        subprocess.run(["ip", "link", "delete", BRIDGE], check=False, capture_output=True)
        for left in sorted(CGROUPS.glob("*/kubepods/**/"), reverse=True):
            with suppress(OSError):  # in use by another cluster on this machine
                left.rmdir()

    def _unpack(self, *names: str) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.unpacked, names))
        for component in COMPONENTS:
            (self.folder / "bin" / component).symlink_to("kubernetes")

    def _start_containerd(self) -> None:
        content = self.folder / "containerd"  # in memory, because unpacking the images to a disk takes a minute
        content.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8g", "tmpfs", content], check=True)
        (self.folder / "containerd.toml").write_text(CONTAINERD.format(folder=self.folder, pause=PAUSE))
        (self.folder / "cni").mkdir()
        (self.folder / "cni" / "10-bridge.conflist").write_text(json.dumps(self._network()))
        self.service("containerd").run("containerd", "--config", self.folder / "containerd.toml")
        until(lambda: succeeds(*self.ctr("version")), "containerd")

    def _network(self) -> dict[str, object]:
        subnet = {"ranges": [[{"subnet": f"{SUBNET}.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}
        ipam = {"type": "host-local", "dataDir": str(self.folder / "ipam"), **subnet}
        bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "hairpinMode": True, "ipam": ipam}
        return {"cniVersion": "0.4.0", "name": NETWORK, "plugins": [bridge]}

    def _start_control_plane(self, etcd: int, peer: int, api: int, kubelet: int) -> None:
        own = {"folder": self.folder, "etcd": etcd, "peer": peer, "api": api, "kubelet": kubelet}
        for name, flags in CONTROL_PLANE.items():
            program, *rest = flags.format(**own).split()
            self.service(name).run(self.folder / "bin" / program, *rest)
            if name == "apiserver":
                until(lambda: self.answers("get", "--raw=/readyz"), "the API server")

    def _start_kubelet(self, port: int) -> None:
        settings = KUBELET.format(folder=self.folder, port=port, dns=f"{SUBNET}.1")
        (self.folder / "kubelet.yaml").write_text(settings)
        flags = (f"--kubeconfig={self.folder}/pki/node.conf", f"--config={self.folder}/kubelet.yaml")
        more = (f"--hostname-override={NODE}", f"--root-dir={self.folder}/kubelet")
        self.service("kubelet").run(self.folder / "bin" / "kubelet", *flags, *more)

    def _start_name_server(self) -> None:
        """Starts CoreDNS on the bridge. The network plugin would create the bridge only with the first pod."""
        for command in ("link add {0} type bridge", "addr add {1}.1/24 dev {0}", "link set {0} up"):
            subprocess.run(["ip", *command.format(BRIDGE, SUBNET).split()], check=True)
        (self.folder / "Corefile").write_text(COREFILE.format(address=f"{SUBNET}.1", kubeconfig=self.kubeconfig))
        self.service("coredns").run(self.folder / "bin" / "coredns", "-conf", self.folder / "Corefile")

    def answers(self, *arguments: str) -> bool:
        """Whether kubectl ends with 0."""
        return succeeds(KUBECTL, f"--kubeconfig={self.kubeconfig}", *arguments)

    def _offer_gpus(self) -> None:
        places = (f"/status/{kind}/nvidia.com~1gpu" for kind in ("capacity", "allocatable"))
        patch = [{"op": "add", "path": path, "value": str(N_GPUS)} for path in places]
        self.kubectl("patch", "node", NODE, "--subresource=status", "--type=json", f"--patch={json.dumps(patch)}")

    def _end_pods(self) -> None:
        """Lets the kubelet end all pods, which also removes their networks; kills those that remain after 30 s."""
        pods = "delete", "pods", "--all", "--all-namespaces", "--force", "--grace-period=0", "--wait=false"
        with suppress(AssertionError):
            assert self.answers(*pods), "the API server does not answer"
            until(lambda: not self._tasks(), "the end of all pods", 30)
        self.service("kubelet").stop()
        for task in self._tasks():
            subprocess.run(self.ctr("tasks", "kill", "--signal=SIGKILL", task), check=False, capture_output=True)
        for cached in Path("/var/lib/cni/results").glob(f"{NETWORK}-*"):
            cached.unlink()

    def _tasks(self) -> list[str]:
        done = subprocess.run(self.ctr("tasks", "list", "--quiet"), check=False, capture_output=True, text=True)
        return done.stdout.split()


def _unmount(folder: Path) -> None:
    places = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for place in sorted((one for one in places if one.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)


def can_start() -> bool:
    """Whether this process may run a node, which needs root."""
    return os.geteuid() == 0


CONTAINERD = """\
version = 2
root = "{folder}/containerd"
state = "{folder}/containerd-state"
[grpc]
  address = "{folder}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true  # within a container, lowering it may be forbidden
  disable_apparmor = true
  sandbox_image = "{pause}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{folder}/cni"
"""

# A node counts as lost after 20 s without a sign of life instead of the default 50, because a test waits for that.
CONTROL_PLANE = {
    "etcd": "etcd --data-dir {folder}/etcd --unsafe-no-fsync --listen-client-urls http://127.0.0.1:{etcd} "
    "--advertise-client-urls http://127.0.0.1:{etcd} --listen-peer-urls http://127.0.0.1:{peer}",
    "apiserver": "kube-apiserver --etcd-servers=http://127.0.0.1:{etcd} --bind-address=127.0.0.1 --secure-port={api} "
    "--advertise-address=127.0.0.1 --tls-cert-file={folder}/pki/api.crt --tls-private-key-file={folder}/pki/api.key "
    "--client-ca-file={folder}/pki/ca.crt --service-account-key-file={folder}/pki/sa.pub "
    "--service-account-signing-key-file={folder}/pki/sa.key --service-account-issuer=https://kubernetes.default.svc "
    "--service-cluster-ip-range=10.96.0.0/16 --authorization-mode=Node,RBAC "
    "--kubelet-client-certificate={folder}/pki/admin.crt --kubelet-client-key={folder}/pki/admin.key "
    "--kubelet-preferred-address-types=Hostname",
    "controllers": "kube-controller-manager --kubeconfig={folder}/pki/admin.conf --secure-port=0 "
    "--service-account-private-key-file={folder}/pki/sa.key --root-ca-file={folder}/pki/ca.crt --leader-elect=false "
    "--node-monitor-grace-period=20s --node-monitor-period=2s",
    "scheduler": "kube-scheduler --kubeconfig={folder}/pki/admin.conf --secure-port=0 --leader-elect=false",
}

KUBELET = """\
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 127.0.0.1
port: {port}
healthzPort: 0
nodeLeaseDurationSeconds: 12
containerRuntimeEndpoint: unix://{folder}/containerd.sock
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
authentication: {{anonymous: {{enabled: false}}, x509: {{clientCAFile: {folder}/pki/ca.crt}}}}
authorization: {{mode: AlwaysAllow}}
tlsCertFile: {folder}/pki/api.crt
tlsPrivateKeyFile: {folder}/pki/api.key
clusterDNS: [{dns}]
clusterDomain: cluster.local
enforceNodeAllocatable: []
makeIPTablesUtilChains: false
evictionHard: {{memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}}
imageGCHighThresholdPercent: 99
imageGCLowThresholdPercent: 98
"""

COREFILE = """\
cluster.local:53 {{
 bind {address}
 errors
 kubernetes cluster.local {{
  kubeconfig {kubeconfig} tests
 }}
}}
"""
