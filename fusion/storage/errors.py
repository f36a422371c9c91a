"""Classifies errors of stores: transient ones are retried; others become an error with exit code, cause and hint.

S3's client and servers tell errors apart by the name of an exception or a code in its text, so this module looks for
these names in the error and in the errors that caused it.
"""

from __future__ import annotations

import errno
import logging
import os

from fusion.errors import ConfigError, CredentialsError, DataError, FusionError, UnreachableError

# Credentials are missing, wrong or expired, or lack a permission: CredentialsError.
_DENIED = (
    *("ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "Forbidden"),
    "(400) when calling the Head",  # an expired token; the answer to a HEAD request has no body with a code
    "AuthorizationHeaderMalformed",  # because of the access key; if the region is the cause, `_MISTAKES` matches first
    # Some or all credentials are missing:
    *("NoCredentials", "PartialCredentials", "ProfileNotFound", "InvalidConfig", "ConfigParse", "ConfigNotFound"),
    # The role, program or sign-in that should provide credentials failed:
    *("CredentialRetrieval", "MetadataRetrieval", "InvalidIdentityToken", "IDPRejectedClaim", "InvalidClientTokenId"),
    *("SSOTokenLoad", "UnauthorizedSSOToken", "TokenRetrieval", "TokenRefreshRequired", "NoAuthToken"),
    *("LoginRefreshRequired", "LoginTokenLoad", "LoginInsufficientPermissions", "MissingDependency"),
    "JSONDecodeError",  # the output of such a program; the store itself answers in XML
)
# A listing of S3 is empty if it finds nothing, and fails with NoSuchBucket without the bucket. A bare 404 is the answer
# of another server.
_NO_LISTING = ("(404) when calling the ListObjects",)
# A setting is wrong: ConfigError. Hint -> names in the error; the first match counts.
_MISTAKES = {
    "correct AWS_ROLE_ARN or AWS_ROLE_SESSION_NAME": ("parameter Role",),
    "correct the URL": ("ParamValidation", "InvalidBucketName"),
    "set AWS_DEFAULT_REGION to the bucket's region": (
        *("header is malformed; the region", "PermanentRedirect", "(301) when calling the Head"),
    ),
    "correct AWS_ENDPOINT_URL_S3, such as https://storage.example.com": ("Invalid endpoint: ",),
    "correct AWS_DEFAULT_REGION": ("InvalidRegion",),
    "correct AWS_ENDPOINT_URL_S3: the server there does not support this request of S3": ("MethodNotAllowed", "(405)"),
    "correct AWS_ENDPOINT_URL_S3: the server there is not one of S3": _NO_LISTING,
}
# Errors of stores that do not support the checksums that botocore adds since 1.36, or the trailer that contains them.
_CHECKSUMS = (
    *("x-amz-sdk-checksum", "x-amz-checksum", "x-amz-trailer", "STREAMING-UNSIGNED-PAYLOAD-TRAILER"),
    *("MissingContentLength", "NotImplemented", "(501)"),
)
# The store does not support conditional requests.
_UNSUPPORTED = ("NotImplemented", "MethodNotAllowed", "(501)", "(405)", "If-None-Match", "If-Match")
_PROXY = ("ProxyConnection", "ClientHttpProxy", "ClientProxyConnection")
_PROXY_VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
# Transient: no answer, or a damaged one.
_NO_ANSWER = (
    *("EndpointConnection", "ConnectTimeout", "ReadTimeout", "ConnectionClosed", "HTTPClient", "ClientConnect"),
    *("ClientPayload", "ResponseStreaming", "ResponseParser"),  # the answer was cut off, or is not XML
    *("FlexibleChecksum", "BadDigest", "IncompleteBody"),  # bytes were changed or lost on the way
    *_PROXY,
)
# Transient: the store is overloaded or has an internal error.
_BUSY = (
    *("SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttl"),
    *("(500)", "(502)", "(503)", "(504)"),  # in the answer to a HEAD request, which has no body with a code
)
_FULL = ("QuotaExceeded", "StorageFull", "InsufficientStorage", "(507)")
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# Limits of the operating system, which no retry changes: errno -> hint.
_LIMITS = {
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or use another file system",
    errno.ENAMETOOLONG: "shorten the name or the path",
    errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
    errno.ENFILE: "raise the limit of open files of this machine: sysctl fs.file-max",
}
# Transient: errors of a network file system whose server restarts or fails over.
_PASSING = (errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EAGAIN, errno.EHOSTDOWN, errno.ENOTCONN)
# Transient: a role's credentials come from a service of the node. It may restart, and it learns of a new role only
# after some seconds. A training renews its credentials every hour, and exit code 77 would end it without a retry.
_METADATA = ("MetadataRetrieval", "credentials from container-role", "credentials from iam-role")

# These libraries log the traceback of every failed sign-in. A handler that drops it avoids that: once the failure is
# final, the user gets an error and a hint.
for _name in ("botocore", "aiobotocore"):
    logging.getLogger(_name).addHandler(logging.NullHandler())


def is_transient(error: BaseException) -> bool:
    """Whether the store did not answer, or failed in a way that a retry may overcome."""
    if isinstance(error, FusionError | FileNotFoundError | PermissionError):
        return False
    if named(error, _METADATA):
        return True
    if named(error, _DENIED) or _mistake(error):
        return False
    if isinstance(error, ConnectionError | TimeoutError) or named(error, _NO_ANSWER + _BUSY):
        return True
    # s3fs raises EIO for any error of S3 that it does not know. So EIO is only transient without an answer from S3.
    return isinstance(error, OSError) and error.errno in _PASSING and _answer(error) is None


def is_unreachable(error: BaseException) -> bool:
    """Whether nothing listens at the store's address, or its host name is unknown; often because of a wrong setting."""
    return named(error, ("EndpointConnection", *_PROXY)) and not named(error, ("ConnectTimeout",))


def is_unsupported(error: BaseException) -> bool:
    """Whether the store does not support this operation, or a header of the request."""
    return named(error, _UNSUPPORTED)


def _answer(error: BaseException) -> BaseException | None:
    """botocore's error that contains the store's answer; None if the store did not answer."""
    return next((link for link in _chain(error) if hasattr(link, "operation_name")), None)


def is_absence(url: str, error: Exception) -> bool:
    """Whether a FileNotFoundError means that the object is missing.

    For S3 it may instead be a local file or program that should provide credentials. Only then the error has a file
    name, because it comes from the operating system. Or a server that is not one of S3 has answered.
    """
    if named(error, _NO_LISTING):
        return False
    return getattr(error, "filename", None) is None or not url.startswith(("s3://", "s3a://"))


def is_store_error(error: BaseException) -> bool:
    """Whether an error comes from the store, rather than from damaged bytes that were read."""
    missing = isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError)
    return missing or is_transient(error) or named(error, _DENIED) or bool(_mistake(error))


def explained(url: str, error: Exception) -> Exception:
    """The FusionError that describes an error of the store to the user; a bug is returned unchanged."""
    if isinstance(error, FusionError):
        return error
    cause = _cause(error)
    if is_full(error):
        return UnreachableError(f"no space is left for {url} ({cause})", "free some space, then run it again")
    missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if missing and is_absence(url, error):
        return _missing(url, error)
    if remedy := _mistake(error):
        return ConfigError(f"{url} cannot be opened ({cause})", remedy)
    if missing or _is_refusal(error):
        return CredentialsError(
            f"no access to {url} ({cause})", "check credentials, their expiry and their permissions"
        )
    if is_transient(error):
        return UnreachableError(f"{url} does not answer ({cause})", _where_to_look(error))
    return error


def is_full(error: BaseException) -> bool:
    """Whether a disk, a quota or a bucket is full.

    The exit code is then 69 (unreachable): space may become free without a change of settings, so a scheduler may
    retry.
    """
    return named(error, _FULL) or (isinstance(error, OSError) and error.errno in _FULL_DISK)


def is_no_bucket(error: BaseException) -> bool:
    """Whether the bucket itself does not exist, rather than an object or folder in it."""
    return named(error, ("NoSuchBucket",))


def _missing(url: str, error: BaseException) -> DataError:
    if is_no_bucket(error):
        bucket = url.partition("://")[2].split("/")[0]
        return DataError(f"there is no bucket {bucket} ({url})", "correct its name, or create it")
    # The text of a FileNotFoundError would only repeat what the message says.
    cause = "" if isinstance(error, FileNotFoundError) else f" ({_cause(error)})"
    return DataError(f"{url} does not exist{cause}", "check the path for a misspelt folder or file name")


def reason_of(error: BaseException) -> str:
    """A short description of why the store does not answer."""
    said = " ".join(str(link) for link in _chain(error))
    if isinstance(error, ConnectionRefusedError) or "Connect call failed" in said:
        return f"connection refused ({_cause(error)})"
    return _cause(error)


def _where_to_look(error: BaseException) -> str:
    if not named(error, _PROXY):
        return "check endpoint and network, then run it again"
    names = [name for name in _PROXY_VARIABLES if os.environ.get(name) or os.environ.get(name.lower())]
    proxy = " and ".join(names) or "the proxy's setting"
    return f"correct or unset {proxy}, or name the store's host in NO_PROXY"


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, PermissionError) or named(error, _DENIED) or getattr(error, "errno", 0) == errno.EROFS


def _mistake(error: BaseException) -> str:
    """The hint for an error that a wrong setting or limit causes; empty for any other error."""
    if named(error, _CHECKSUMS):
        return _without_checksums(error)
    if isinstance(error, OSError) and error.errno in _LIMITS:
        return _LIMITS[error.errno]
    return next((remedy for remedy, names in _MISTAKES.items() if named(error, names)), "")


def _without_checksums(error: BaseException) -> str:
    operation = getattr(_answer(error), "operation_name", "")
    is_reading = operation.startswith(("Get", "Head"))
    name = "AWS_RESPONSE_CHECKSUM_VALIDATION" if is_reading else "AWS_REQUEST_CHECKSUM_CALCULATION"
    return f"set {name}=when_required: this store does not support the checksums that the client adds"


def _cause(error: BaseException) -> str:
    """Type and first line of an error."""
    said = str(error).removeprefix("Parameter validation failed:\n")
    return f"{type(error).__name__}: {said}".splitlines()[0]


def named(error: BaseException, names: tuple[str, ...]) -> bool:
    """Whether the error or one of its causes has one of these texts in its type name or message."""
    said = " ".join(f"{type(link).__name__} {link}" for link in _chain(error))
    return any(name in said for name in names)


def _chain(error: BaseException) -> list[BaseException]:
    return [link for link in (error, error.__cause__, error.__context__) if link is not None]
