"""What can be wrong with credentials, regions and URLs, raised by botocore itself."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from fusion import storage
from fusion.errors import ConfigError, CredentialsError, ExitCode, FusionError, UnreachableError
from tests.conftest import Done, run_command
from tests.s3_server import WRITER_KEY, WRITER_SECRET, S3Server

NOWHERE = "http://127.0.0.1:9"
SSO = "https://example.awsapps.com/start"
PROFILES = f"""\
[profile fails]
credential_process = sh -c 'echo expired >&2; exit 1'
[profile babbles]
credential_process = echo please sign in
[profile lacks]
credential_process = /nowhere/sign-in
[profile source]
role_arn = arn:aws:iam::123456789012:role/x
source_profile = nowhere
[profile sso]
sso_start_url = {SSO}
sso_region = us-east-1
sso_account_id = 123456789012
sso_role_name = x
[profile session]
sso_session = s
sso_account_id = 123456789012
sso_role_name = x
[sso-session s]
sso_start_url = {SSO}
sso_region = us-east-1
"""
ROLE = {"AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/x", "AWS_ROLE_SESSION_NAME": "test"}
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
ACTIONS: dict[str, Callable[[str], object]] = {
    "read": storage.read,
    "exists": storage.exists,
    "read_if_exists": storage.read_if_exists,
    "read_version": storage.read_version,
    "ls": storage.ls,
    "remove": storage.remove,
    "write": lambda url: storage.write(url, b"1"),
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with nothing of AWS but the profiles above; stores and services of AWS are nowhere."""
    (tmp_path / "config").write_text(PROFILES)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    use(monkeypatch, settings_of(tmp_path))
    monkeypatch.setattr(storage, "_patience", 0.0)
    return tmp_path


def settings_of(home: Path) -> dict[str, str]:
    settings = {"HOME": str(home), "AWS_CONFIG_FILE": str(home / "config"), "AWS_ENDPOINT_URL": NOWHERE}
    return settings | {"AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "us-east-1"}


def use(monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


class Service(ThreadingHTTPServer):
    """A service of AWS that gives each of these answers once, and the last one from then on."""

    def __init__(self, *answers: tuple[int, str]) -> None:
        super().__init__(("127.0.0.1", 0), _Exchange)
        self.answers, self.n_asked = answers, 0
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Exchange(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # so that it answers `Expect: 100-continue`
    server: Service

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline()
        if not self.raw_requestline or not self.parse_request():
            return
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, body = self.server.answers[min(self.server.n_asked, len(self.server.answers) - 1)]
        self.server.n_asked += 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body.encode())
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing on standard error."""


Serve = Callable[..., Service]


@pytest.fixture
def serve() -> Iterator[Serve]:
    started: list[Service] = []

    def start(*answers: tuple[int, str]) -> Service:
        started.append(Service(*answers))
        return started[-1]

    yield start
    for service in started:
        service.shutdown()
        service.server_close()


def refusal(code: str, message: str = "") -> str:
    """An error in XML, as S3 and STS answer it."""
    return f"<ErrorResponse><Error><Code>{code}</Code><Message>{message}</Message></Error></ErrorResponse>"


def of_s3(code: str, message: str = "") -> str:
    return f"<Error><Code>{code}</Code><Message>{message or code}</Message></Error>"


def raised(action: Callable[[], object]) -> FusionError:
    with pytest.raises(FusionError) as caught:
        action()
    assert len(caught.value.report().splitlines()) == 2
    return caught.value


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"AWS_PROFILE": "nope"}, r"ProfileNotFound: The config profile \(nope\) could not be found"),
        ({"AWS_ACCESS_KEY_ID": "key"}, "PartialCredentialsError: .* missing: AWS_SECRET_ACCESS_KEY"),
        ({"AWS_PROFILE": "fails"}, "CredentialRetrievalError: .* custom-process: expired"),
        ({"AWS_PROFILE": "babbles"}, "JSONDecodeError"),
        ({"AWS_PROFILE": "lacks"}, "No such file or directory: '/nowhere/sign-in'"),
        ({"AWS_PROFILE": "source"}, 'InvalidConfigError: The source_profile "nowhere"'),
        ({"AWS_PROFILE": "sso"}, "SSOTokenLoadError"),
        ({"AWS_PROFILE": "session"}, "SSOTokenLoadError"),
        ({**ROLE, "AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere/token"}, "No such file or directory: '/nowhere/token'"),
    ],
    ids=lambda value: "-".join(value.values()).rsplit("/", 1)[-1] if isinstance(value, dict) else "",
)
def test_missing_credentials(
    settings: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, settings)
    for action in ACTIONS.values():
        with pytest.raises(CredentialsError, match=f"no access to s3://bucket/x .*{said}"):
            action("s3://bucket/x")
    assert capfd.readouterr().err == "", "botocore logs a traceback"


def token_file(home: Path) -> dict[str, str]:
    (home / "token").write_text("token")
    return {**ROLE, "AWS_WEB_IDENTITY_TOKEN_FILE": str(home / "token")}


@pytest.mark.parametrize("code", ["InvalidIdentityToken", "IDPRejectedClaim", "AccessDenied", "ExpiredTokenException"])
def test_a_role_that_is_not_given(code: str, home: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    service = serve((400, refusal(code, "No OpenIDConnect provider found in your account")))
    use(monkeypatch, {**token_file(home), "AWS_ENDPOINT_URL_STS": service.url})
    assert raised(lambda: storage.read("s3://bucket/x")).code == ExitCode.CREDENTIALS


def sign_in(home: Path, of: str, **more: str) -> None:
    """Leaves the token of an earlier sign-in where `aws sso login` does."""
    cache = home / ".aws/sso/cache"
    cache.mkdir(parents=True)
    expiry = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    token = {"accessToken": "t", "expiresAt": expiry, "startUrl": SSO, "region": "us-east-1", **more}
    (cache / f"{hashlib.sha1(of.encode()).hexdigest()}.json").write_text(json.dumps(token))


def test_a_sign_in_that_is_refused(home: Path, serve: Serve) -> None:
    sign_in(home, SSO)
    service = serve((401, json.dumps({"__type": "UnauthorizedException", "message": "Session token not found"})))
    env = settings_of(home) | {"AWS_PROFILE": "sso", "AWS_ENDPOINT_URL_SSO": service.url}
    ended = run_command("fusion.verify", "s3://bucket/x", env=env, new_python=True)
    check(ended, 77, "UnauthorizedSSOTokenError: The SSO session")


def test_a_sign_in_that_has_expired(home: Path) -> None:
    sign_in(home, "s", expiresAt="2026-01-01T00:00:00Z")
    env = settings_of(home) | {"AWS_PROFILE": "session"}
    ended = run_command("fusion.verify", "s3://bucket/x", env=env, new_python=True)
    check(ended, 77, "TokenRetrievalError: ")


def check(ended: Done, code: int, said: str) -> None:
    """Two lines, and nothing else."""
    assert (ended.code, ended.out) == (code, ""), ended.err
    error, hint = ended.err.splitlines()
    assert error.startswith("error: ") and said in error and hint.startswith("hint: "), ended.err


@pytest.mark.parametrize(
    ("status", "answer", "said"),
    [
        (400, of_s3("TokenRefreshRequired"), "TokenRefreshRequired"),
        (400, of_s3("AuthorizationHeaderMalformed", "a non-empty Access Key (AKID) must be provided"), "Access Key"),
        (403, of_s3("InvalidAccessKeyId"), "InvalidAccessKeyId"),
    ],
)
def test_rejected_access_keys(
    status: int, answer: str, said: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, {**KEYS, "AWS_ENDPOINT_URL_S3": serve((status, answer)).url})
    with pytest.raises(CredentialsError, match=said):
        storage.write("s3://bucket/x", b"1")


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (400, of_s3("AuthorizationHeaderMalformed", "The authorization header is malformed; the region 'us-east-1' is "
            "wrong; expecting 'eu-west-1'")),
        (301, of_s3("PermanentRedirect", "The bucket must be addressed using the specified endpoint.")),
    ],
    ids=["400", "301"],
)  # fmt: skip
def test_a_bucket_of_another_region(status: int, answer: str, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    service = serve((status, answer), (403, ""))  # botocore then requests the bucket's region, which fails, too
    use(monkeypatch, {**KEYS, "AWS_ENDPOINT_URL_S3": service.url})
    with pytest.raises(ConfigError) as caught:
        storage.write("s3://bucket/x", b"1")
    assert caught.value.remedy == "set AWS_DEFAULT_REGION to the bucket's region"


@pytest.mark.parametrize(
    ("url", "settings", "said", "remedy"),
    [
        ("s3://my bucket/x", {}, 'Invalid bucket name "my bucket"', "correct the URL"),
        ("s3://", {}, 'Invalid bucket name ""', "correct the URL"),
        ("s3://bucket/x", {"AWS_ENDPOINT_URL_S3": "localhost:9000"}, "Invalid endpoint: ", "correct AWS_ENDPOINT_URL"),
        ("s3://bucket/x", {"AWS_DEFAULT_REGION": "us east"}, "InvalidRegionError: ", "correct AWS_DEFAULT_REGION"),
    ],
)
def test_rejects_invalid_urls_endpoints_and_regions(
    url: str, settings: dict[str, str], said: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, {**KEYS, **settings})
    error = raised(lambda: storage.read(url))
    assert (error.code, said in error.message, error.remedy.startswith(remedy)) == (ExitCode.CONFIG, True, True)


def test_a_metadata_service_is_retried(bucket: str, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore asks it three times, `storage` again: the pod's role may be some seconds away."""
    for name in KEYS:
        monkeypatch.delenv(name)
    given = json.dumps({"AccessKeyId": WRITER_KEY, "SecretAccessKey": WRITER_SECRET, "Token": "",
        "Expiration": (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")})  # fmt: skip
    service = serve(*[(404, "no association")] * 4, (200, given))
    use(monkeypatch, {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{service.url}/v1/credentials"})
    monkeypatch.setattr(storage, "_patience", 30.0)
    storage.write(f"{bucket}/x", b"1")
    assert service.n_asked == 5


def test_a_metadata_service_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{NOWHERE}/v1/credentials"})
    with pytest.raises(CredentialsError, match="Error retrieving metadata: Received error"):
        storage.read("s3://bucket/x")


def test_a_sign_in_service_that_does_not_answer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, token_file(home))
    with pytest.raises(UnreachableError, match="s3://bucket/x does not answer"):
        storage.read("s3://bucket/x")


@pytest.mark.parametrize(
    ("settings", "bucket_name", "code", "said"),
    [
        ({"AWS_PROFILE": "nope"}, "fusion-tests", 77, "ProfileNotFound"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "fusion-tests", 77, "PartialCredentials"),
        ({"AWS_PROFILE": "fails"}, "fusion-tests", 77, "CredentialRetrieval"),
        ({"AWS_PROFILE": "session"}, "fusion-tests", 77, "SSOTokenLoad"),
        ({}, "my bucket", 78, "Invalid bucket name"),
    ],
)
@pytest.mark.parametrize("command", ["all_embeddings.train", "verify"])
def test_commands_print_an_error_and_a_hint(
    command: str, settings: dict[str, str], bucket_name: str, code: int, said: str, s3: S3Server, home: Path
) -> None:
    env = {**s3.environment(), "AWS_CONFIG_FILE": str(home / "config"), **settings}
    if "AWS_PROFILE" in settings:
        env = {name: value for name, value in env.items() if name not in KEYS}
    where = f"s3://{bucket_name}/codes"
    flags = [where] if command == "verify" else ["--data", where, "--output", f"{where}/out", "--device", "cpu"]
    ended = run_command(f"fusion.{command}", *flags, env=env)
    check(ended, code, said)
