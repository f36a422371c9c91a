"""A proxy on loopback that forwards S3 requests, and injects the faults that a test asks for.

It handles one request per connection. It keeps the client's Host header, which is part of the request's signature.
"""

from __future__ import annotations

import random
import re
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import cast
from urllib.parse import unquote

MAX_DELAY = 0.3  # seconds; long enough to reorder parallel requests, short enough for tests with thousands of requests


class Fault(StrEnum):
    """What can happen to one request."""

    RESET_BEFORE = "reset before the server gets the request"
    RESET_IN_REQUEST = "reset when the server has half of the request"
    RESET_IN_RESPONSE = "reset in the response, after the server has executed the request"
    TRUNCATE = "connection closed before the end of the body"
    SLOW_DOWN = "503 SlowDown"
    INTERNAL = "500 InternalError"
    EXPIRED = "400 ExpiredToken"
    DENIED = "403 ExpiredToken"
    DELAY = "answered late"
    STALL = "half of the response, then silence"


RESETS = (Fault.RESET_BEFORE, Fault.RESET_IN_REQUEST, Fault.RESET_IN_RESPONSE)
_ANSWERS = {
    Fault.SLOW_DOWN: ("503 Service Unavailable", "SlowDown"),
    Fault.INTERNAL: ("500 Internal Server Error", "InternalError"),
    Fault.EXPIRED: ("400 Bad Request", "ExpiredToken"),
    Fault.DENIED: ("403 Forbidden", "ExpiredToken"),
}


@dataclass(frozen=True)
class Request:
    """The request line and headers of a request.

    Attributes:
        number: position among all requests of this proxy, from 0.
    """

    head: bytes
    number: int

    @property
    def method(self) -> str:
        return self.head.split(b" ", 1)[0].decode()

    @property
    def path(self) -> str:
        return self.head.split(b" ", 2)[1].decode()

    @property
    def length(self) -> int:
        found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", self.head)
        return int(found[1]) if found else 0

    @property
    def forwarded(self) -> bytes:
        """The head for the server, without `Expect`, which the proxy answers itself, and with `Connection: close`."""
        return re.sub(rb"(?i)\r\n(?:expect|connection): [^\r]*", b"", self.head[:-2]) + b"Connection: close\r\n\r\n"


Plan = Callable[[Request], Fault | None]


def at_random(share: float, faults: Sequence[Fault], seed: int = 0) -> Plan:
    """Injects one of the faults into a random share of the requests."""
    generator = random.Random(seed)
    return lambda _: generator.choice(faults) if generator.random() < share else None


def outage(seconds: float) -> Plan:
    """Resets all connections for some seconds, from the first request on."""
    began: list[float] = []

    def plan(_: Request) -> Fault | None:
        began.append(time.monotonic())
        return Fault.RESET_BEFORE if began[-1] - began[0] < seconds else None

    return plan


def once(matches: Callable[[Request], bool], then: Plan) -> Plan:
    """Injects no fault before the first request that matches; from that one on, follows the plan `then`."""
    met = threading.Event()

    def plan(request: Request) -> Fault | None:
        if matches(request):
            met.set()
        return then(request) if met.is_set() else None

    return plan


def always(fault: Fault) -> Plan:
    return lambda _: fault


class FaultProxy(socketserver.ThreadingTCPServer):
    """Listens from construction until `stop`.

    Attributes:
        plan: decides which fault each request gets; None: no faults.
        hold: called with each request before it is forwarded; it may block, which does not affect other requests.
        met: number of requests by fault; None counts the requests without a fault.
        seen: all requests, as "GET /bucket/key", in order.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Exchange)
        host, port = upstream.removeprefix("http://").split(":")
        self.upstream = host, int(port)
        self.plan: Plan | None = None
        self.hold: Callable[[Request], None] | None = None
        self.met: Counter[Fault | None] = Counter()
        self.seen: list[str] = []
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def stop(self) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()

    def decide(self, head: bytes) -> tuple[Request, Fault | None]:
        with self._lock:
            request = Request(head, self.met.total())
            fault = self.plan(request) if self.plan else None
            self.met[fault] += 1
            self.seen.append(f"{request.method} {unquote(request.path)}")
        return request, fault

    def handle_error(self, request: object, client_address: object) -> None:
        """Prints nothing when a client closes its connection."""


class _Exchange(socketserver.StreamRequestHandler):
    """Handles one request."""

    server: FaultProxy
    connection: socket.socket

    def handle(self) -> None:
        head = b"".join(iter(self._line, b""))
        if not head:
            return
        request, fault = self.server.decide(head + b"\r\n")
        if self.server.hold:
            self.server.hold(request)
        if fault is Fault.RESET_BEFORE:
            _reset(self.connection)
            return
        if fault is Fault.DELAY:
            time.sleep(random.uniform(0, MAX_DELAY))
        if b"100-continue" in head.lower():
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault is Fault.RESET_IN_REQUEST:
            self._forward(request.forwarded + self.rfile.read(request.length // 2), part=True)
            _reset(self.connection)
            return
        body = self.rfile.read(request.length)
        answer = _refusal(request, fault) if fault in _ANSWERS else self._forward(request.forwarded + body)
        self._reply(answer, fault)

    def _line(self) -> bytes:
        line = self.rfile.readline()
        return b"" if line == b"\r\n" else line

    def _forward(self, data: bytes, part: bool = False) -> bytes:
        with socket.create_connection(self.server.upstream) as server:
            server.sendall(data[: len(data) - 1] if part else data)
            if part:
                _reset(server)
                return b""
            return b"".join(iter(lambda: server.recv(1 << 16), b""))

    def _reply(self, answer: bytes, fault: Fault | None) -> None:
        head, _, body = answer.partition(b"\r\n\r\n")
        half = answer[: len(answer) - (len(body) + 1) // 2] if body else head[: len(head) // 2]
        cut = fault in (Fault.RESET_IN_RESPONSE, Fault.TRUNCATE, Fault.STALL)
        self.connection.sendall(half if cut else answer)
        if fault is Fault.STALL:
            self.server.stopping.wait(300)
        if fault is Fault.RESET_IN_RESPONSE:
            _reset(self.connection)


def _refusal(request: Request, fault: Fault | None) -> bytes:
    status, code = _ANSWERS[cast(Fault, fault)]
    xml = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}.</Message></Error>'
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    head += f"Content-Length: {len(xml)}\r\n\r\n"
    return (head if request.method == "HEAD" else head + xml).encode()  # S3 answers HEAD without a body


def _reset(connection: socket.socket) -> None:
    """Closes a connection with a TCP RST, as a crashed peer or a firewall does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
