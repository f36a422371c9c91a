"""Runs kubectl with a fixed context and namespace, and turns its failures into errors with exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from fusion.errors import ConfigError, CredentialsError, FusionError, UnreachableError

# How kubectl prints an error that the API server returned, with its reason in brackets. An error without a reason comes
# from a component behind the API server, such as "etcdserver: leader changed", or from a webhook.
SERVER_ERROR = re.compile(r"^Error from server(?: \((?P<reason>\w+)\))?: ", re.MULTILINE)
# Reasons that pass: a retry of the same request may succeed.
BUSY = {"InternalError", "ServerTimeout", "ServiceUnavailable", "Timeout", "TooManyRequests"}
DENIED_BY_WEBHOOK = "denied the request"
# RBAC refuses with this text. Quotas and policies have the same reason, Forbidden, but another text.
NO_PERMISSION = re.compile(r'User "[^"]*" cannot ')
# The texts below come from kubectl and its plugins for credentials. They are searched in this order, because a failed
# login or a certificate error may also contain "Unable to connect".
LOGIN_ERRORS = ("must be logged in", "getting credentials", "refresh token", "oauth2")
CERTIFICATE_ERRORS = ("x509:", "tls: failed to verify")
UNREACHABLE = (
    "refused", "Unable to connect", "timeout", "timed out", "deadline exceeded", "no such host", "unexpected EOF",
    "reset by peer", "connection lost", "unable to handle the request",
)  # fmt: skip

REQUEST_TIMEOUT = "--request-timeout=30s"  # by default kubectl waits forever, even on a dead connection

MISSING = ("there is no kubectl here", "install kubectl, and give it access to the cluster")

Object = dict[str, Any]


class BusyError(UnreachableError):
    """The cluster cannot serve the request at the moment, for example because it is overloaded. A retry may succeed."""


@dataclass(frozen=True)
class Kubectl:
    """Calls kubectl with a context and a namespace that stay the same when the user runs `kubectl config` meanwhile.

    Attributes:
        context: None where there is no kubeconfig, as in a pod, where kubectl finds the cluster by itself.
        namespace: None: the one that kubectl uses by default.
    """

    context: str | None = None
    namespace: str | None = None

    @classmethod
    def now(cls, namespace: str | None, context: str | None = None) -> Kubectl:
        """Kubectl with the current context and that context's namespace, unless others are given.

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
        """How a user calls kubectl for the same namespace, for hints."""
        return f"kubectl --namespace={self.namespace}" if self.namespace else "kubectl"

    def __call__(self, *arguments: str, text: str | None = None) -> str:
        """Runs kubectl and returns its output.

        Args:
            text: standard input.

        Raises:
            UnreachableError: there is no kubectl here, or the cluster does not answer.
            BusyError: the cluster answered that it cannot serve the request now.
            CredentialsError: the user is not logged in, or lacks a permission.
            ConfigError: the cluster refused the request for another reason.
        """
        return _run(*self._where(), *arguments, text=text)

    def _where(self) -> list[str]:
        where = {"context": self.context, "namespace": self.namespace}
        return [f"--{name}={value}" for name, value in where.items() if value]

    def output_lines(self, *arguments: str) -> Iterator[str]:
        """Yields the lines of kubectl's output as they come; at their end, raises the same errors as `__call__`."""
        command = ["kubectl", *self._where(), *arguments]
        with tempfile.TemporaryFile("w+", errors="replace") as said, _started(command, said) as process:
            try:
                assert process.stdout
                yield from (line.rstrip("\n") for line in process.stdout)
            finally:
                process.terminate()  # for a caller that stops reading early; no effect on a process that has ended
            if process.wait() > 0:
                said.seek(0)
                raise error_from(said.read().strip())

    def get(self, *arguments: str) -> Object | None:
        """The object or list that `kubectl get` returns for these arguments; None when there is nothing."""
        said = self("get", *arguments, "--ignore-not-found", "--output=json", REQUEST_TIMEOUT)
        return json.loads(said) if said.strip() else None


def _run(*arguments: str, text: str | None = None) -> str:
    try:
        done = subprocess.run(["kubectl", *arguments], check=False, capture_output=True, text=True, input=text)
    except FileNotFoundError as error:
        raise UnreachableError(*MISSING) from error
    if done.returncode:
        raise error_from(done.stderr.strip())
    return done.stdout


def _started(command: Sequence[str], errors: IO[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace")
    except FileNotFoundError as error:
        raise UnreachableError(*MISSING) from error


def error_from(said: str) -> FusionError:
    """The error for the message that kubectl failed with.

    >>> error_from("Error from server: etcdserver: leader changed").code
    <ExitCode.UNREACHABLE: 69>
    """
    last = said.splitlines()[-1] if said else "kubectl failed without a message"
    if found := SERVER_ERROR.search(said):
        return _error_from_server(said, found["reason"], last)
    if any(word in said for word in LOGIN_ERRORS):
        return _access_error(last, "log in to the cluster again")
    if any(word in said for word in UNREACHABLE) and not any(word in said for word in CERTIFICATE_ERRORS):
        return UnreachableError(f"the cluster does not answer: {last}", "see `kubectl cluster-info`")
    return _refused_error(last, "see `kubectl config get-contexts` and k8s/README.md")


def _error_from_server(said: str, reason: str | None, last: str) -> FusionError:
    """The error for a status that the API server returned.

    Args:
        said: all that kubectl printed.
        reason: the status's reason; None when it has none.
        last: the last line that kubectl printed, for the message.
    """
    if reason == "Unauthorized":
        return _access_error(last, "log in to the cluster again")
    if reason == "Forbidden" and NO_PERMISSION.search(said):
        return _access_error(last, "ask for the permission; `kubectl auth can-i --list` shows those you have")
    if reason in BUSY or (not reason and DENIED_BY_WEBHOOK not in said):
        return BusyError(f"the cluster cannot answer now: {last}", "try again in a minute")
    if reason == "Forbidden":
        return _refused_error(last, "ask for less, or see `kubectl describe resourcequota,limitrange`")
    return _refused_error(last, "see k8s/README.md")


def _access_error(last: str, remedy: str) -> FusionError:
    return CredentialsError(f"the cluster denies you access: {last}", remedy)


def _refused_error(last: str, remedy: str) -> FusionError:
    return ConfigError(f"the cluster refuses the job: {last}", remedy)
