"""An S3 server in memory that reads, writes, lists and deletes, and ignores everything else, such as conditions.

Real stores lack different operations. With `refuse` a test makes this server refuse requests as one of them does.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

Refuse = Callable[[str, Mapping[str, str]], tuple[int, str] | None]  # method and headers to status and code
BUCKET = "plain"


class PlainS3(ThreadingHTTPServer):
    """Listens from construction until `stop`; has one bucket, `plain`.

    Attributes:
        objects: the stored bytes by key.
        refuse: returns the status and error code to answer a request with, or None to execute it.
    """

    daemon_threads = True

    def __init__(self, refuse: Refuse = lambda method, headers: None) -> None:
        super().__init__(("127.0.0.1", 0), _Exchange)
        self.objects: dict[str, bytes] = {}
        self.refuse = refuse
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Exchange(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: PlainS3

    def do_GET(self) -> None:
        self._answered(lambda key: self._list() if "list-type" in self._query() else self._object(key))

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        def put(key: str) -> None:
            self.server.objects[key] = self._body
            self._send(200, b"", ETag=_tag(self._body))

        self._answered(put)

    def do_DELETE(self) -> None:
        def delete(key: str) -> None:
            self.server.objects.pop(key, None)
            self._send(204, b"")

        self._answered(delete)

    do_POST = do_PUT

    def _answered(self, act: Callable[[str], None]) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        bucket, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        refusal = self.server.refuse(self.command, {name.lower(): value for name, value in self.headers.items()})
        if refusal:
            self._fail(*refusal)
        elif bucket != BUCKET:
            self._fail(404, "NoSuchBucket")
        else:
            act(key)

    def _object(self, key: str) -> None:
        if key not in self.server.objects:
            self._fail(404, "NoSuchKey")
            return
        data = self.server.objects[key]
        self._send(200, data, ETag=_tag(data))

    def _list(self) -> None:
        prefix, found = self._query().get("prefix", [""])[0], list[str]()
        for key in sorted(self.server.objects):
            if key.startswith(prefix):
                data = self.server.objects[key]
                found.append(
                    f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><ETag>{_tag(data)}</ETag></Contents>"
                )
        self._send(200, f"<ListBucketResult>{''.join(found)}</ListBucketResult>".encode())

    def _query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)

    def _fail(self, status: int, code: str) -> None:
        self._send(status, f"<Error><Code>{code.split(':')[0]}</Code><Message>{code}</Message></Error>".encode())

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def log_message(self, *_: object) -> None:
        """Prints no requests on standard error."""


def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'
