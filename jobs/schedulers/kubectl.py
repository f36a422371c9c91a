"""kubectl, with the cluster and the namespace of one moment, and what its refusals mean."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from fusion.errors import ConfigError, CredentialsError, FusionError, UnreachableError

# How kubectl prints the status of an answer that is no success: its reason in brackets, where it has one. One without
# comes from behind the API server, such as "etcdserver: leader changed", or from a webhook.
ANSWER = re.compile(r"^Error from server(?: \((?P<reason>\w+)\))?: ", re.MULTILINE)
BUSY = {"InternalError", "ServerTimeout", "ServiceUnavailable", "Timeout", "TooManyRequests"}
DENIED = "denied the request"  # by a webhook: how the API server begins what it tells of one
NO_PERMISSION = re.compile(r'User "[^"]*" cannot ')  # RBAC; quotas and policies answer with Forbidden as well
LOGIN = ("must be logged in", "getting credentials", "refresh token", "oauth2")  # of clients: no answer of the server
UNTRUSTED = ("x509:", "tls: failed to verify")
NO_ANSWER = (
    "refused", "Unable to connect", "timeout", "timed out", "deadline exceeded", "no such host", "unexpected EOF",
    "reset by peer", "connection lost", "unable to handle the request",
)  # fmt: skip

REQUEST_TIMEOUT = "--request-timeout=30s"  # kubectl's own is for ever, also where a connection is dead

MISSING = ("there is no kubectl here", "install kubectl, and give it access to the cluster")

Object = dict[str, Any]


class BusyError(UnreachableError):
    """The cluster answered that it cannot answer now: its store has no leader, or it has too much to do."""


@dataclass(frozen=True)
class Kubectl:
    """Calls kubectl, always with the same context and namespace: `kubectl config` in another terminal changes neither.

    Attributes:
        context: None where there is no kubeconfig, as in a pod: kubectl finds the cluster by itself then.
        namespace: None leaves it to kubectl.
    """

    context: str | None = None
    namespace: str | None = None

    @classmethod
    def now(cls, namespace: str | None, context: str | None = None) -> Kubectl:
        """With the context that is current, and its namespace, unless others are given.

        Raises:
            UnreachableError: there is no kubectl here.
            ConfigError: the kubeconfig cannot be read, or lacks the context.
        """
        config = json.loads(_run("config", "view", "--output=json"))
        name = context or config.get("current-context") or None
        contexts = {one["name"]: one["context"] for one in config.get("contexts") or []}
        if context and context not in contexts:
            there = ", ".join(contexts) or "none"
            raise ConfigError(f"the kubeconfig has no context {context}, there are: {there}", "give one with --context")
        return cls(name, namespace or contexts.get(name, {}).get("namespace"))

    @property
    def command(self) -> str:
        """How a user calls it for the same namespace."""
        return f"kubectl --namespace={self.namespace}" if self.namespace else "kubectl"

    def __call__(self, *arguments: str, text: str | None = None) -> str:
        """Output of kubectl.

        Raises:
            UnreachableError: there is no kubectl here, or the cluster does not answer; BusyError: not now.
            CredentialsError: the cluster does not let this user.
            ConfigError: it refuses what it got.
        """
        return _run(*self._where(), *arguments, text=text)

    def _where(self) -> list[str]:
        where = {"context": self.context, "namespace": self.namespace}
        return [f"--{name}={value}" for name, value in where.items() if value]

    def lines(self, *arguments: str) -> Iterator[str]:
        """Lines of kubectl's output as they come; raises as `__call__` does, at their end."""
        command = ["kubectl", *self._where(), *arguments]
        with tempfile.TemporaryFile("w+", errors="replace") as said, _started(command, said) as process:
            try:
                assert process.stdout
                yield from (line.rstrip("\n") for line in process.stdout)
            finally:
                process.terminate()  # where nobody wants the rest; one that has ended does not notice
            if process.wait() > 0:
                said.seek(0)
                raise refusal(said.read().strip())

    def get(self, *arguments: str) -> Object | None:
        """What is stored under a name, or a list; None when there is nothing."""
        said = self("get", *arguments, "--ignore-not-found", "--output=json", REQUEST_TIMEOUT)
        return json.loads(said) if said.strip() else None


def _run(*arguments: str, text: str | None = None) -> str:
    try:
        done = subprocess.run(["kubectl", *arguments], check=False, capture_output=True, text=True, input=text)
    except FileNotFoundError as error:
        raise UnreachableError(*MISSING) from error
    if done.returncode:
        raise refusal(done.stderr.strip())
    return done.stdout


def _started(command: Sequence[str], errors: IO[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace")
    except FileNotFoundError as error:
        raise UnreachableError(*MISSING) from error


def refusal(said: str) -> FusionError:
    """The error for what kubectl printed as it failed.

    >>> refusal("Error from server: etcdserver: leader changed").code
    <ExitCode.UNREACHABLE: 69>
    """
    first = said.splitlines()[-1] if said else "kubectl failed without a word"
    if answer := ANSWER.search(said):
        return _refusal_of_the_server(said, answer["reason"], first)
    if any(word in said for word in LOGIN):
        return _not_let(first, "log in to the cluster again")
    if any(word in said for word in NO_ANSWER) and not any(word in said for word in UNTRUSTED):
        return UnreachableError(f"the cluster does not answer: {first}", "see `kubectl cluster-info`")
    return _refused(first, "see `kubectl config get-contexts` and k8s/README.md")


def _refusal_of_the_server(said: str, reason: str | None, first: str) -> FusionError:
    if reason == "Unauthorized":
        return _not_let(first, "log in to the cluster again")
    if reason == "Forbidden" and NO_PERMISSION.search(said):
        return _not_let(first, "ask for the permission; `kubectl auth can-i --list` shows those you have")
    if reason in BUSY or (not reason and DENIED not in said):
        return BusyError(f"the cluster cannot answer now: {first}", "try again in a minute")
    if reason == "Forbidden":
        return _refused(first, "ask for less, or see `kubectl describe resourcequota,limitrange`")
    return _refused(first, "see k8s/README.md")


def _not_let(first: str, remedy: str) -> FusionError:
    return CredentialsError(f"the cluster does not let you: {first}", remedy)


def _refused(first: str, remedy: str) -> FusionError:
    return ConfigError(f"the cluster refuses the job: {first}", remedy)
