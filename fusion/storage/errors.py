"""What a store's answers mean: silence, which is asked again, or an error with an exit code, a cause and what to do.

Stores and their client say it by the name of an exception or in its text; `fusion.storage` asks here what it is.
"""

from __future__ import annotations

import errno
import logging
import os

from fusion.errors import ConfigError, CredentialsError, DataError, FusionError, UnreachableError

_DENIED = (
    *("ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "Forbidden"),
    "(400) when calling the Head",  # an expired token: the answer to a HEAD has no body to say so
    "AuthorizationHeaderMalformed",  # by the access key; `_MISTAKES` knows the region's
    # There are no credentials, or not all of them:
    *("NoCredentials", "PartialCredentials", "ProfileNotFound", "InvalidConfig", "ConfigParse", "ConfigNotFound"),
    # What should bring them does not: a role, a program, a sign-in.
    *("CredentialRetrieval", "MetadataRetrieval", "InvalidIdentityToken", "IDPRejectedClaim", "InvalidClientTokenId"),
    *("SSOTokenLoad", "UnauthorizedSSOToken", "TokenRetrieval", "TokenRefreshRequired", "NoAuthToken"),
    *("LoginRefreshRequired", "LoginTokenLoad", "LoginInsufficientPermissions", "MissingDependency"),
    "JSONDecodeError",  # of such a program: what a store answers is XML
)
_MISTAKES = {  # the first that fits
    "correct AWS_ROLE_ARN or AWS_ROLE_SESSION_NAME": ("parameter Role",),
    "correct the URL": ("ParamValidation", "InvalidBucketName"),
    "set AWS_DEFAULT_REGION to the bucket's region": (
        *("header is malformed; the region", "PermanentRedirect", "(301) when calling the Head"),
    ),
    "correct AWS_ENDPOINT_URL_S3, such as https://storage.example.com": ("Invalid endpoint: ",),
    "correct AWS_DEFAULT_REGION": ("InvalidRegion",),
    "correct AWS_ENDPOINT_URL_S3: what answers there takes no such request of S3": ("MethodNotAllowed", "(405)"),
}
# How stores refuse the checksums that botocore adds since 1.36, or the trailer that they are sent in.
_CHECKSUMS = (
    *("x-amz-sdk-checksum", "x-amz-checksum", "x-amz-trailer", "STREAMING-UNSIGNED-PAYLOAD-TRAILER"),
    *("MissingContentLength", "NotImplemented", "(501)"),
)
_UNSUPPORTED = ("NotImplemented", "MethodNotAllowed", "(501)", "(405)", "If-None-Match", "If-Match")
_PROXY = ("ProxyConnection", "ClientHttpProxy", "ClientProxyConnection")
_PROXY_VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
_SILENT = (
    *("EndpointConnection", "ConnectTimeout", "ReadTimeout", "ConnectionClosed", "HTTPClient", "ClientConnect"),
    *("ClientPayload", "ResponseStreaming", "ResponseParser"),  # an answer that broke off, or is no XML
    *("FlexibleChecksum", "BadDigest", "IncompleteBody"),  # bytes that did not arrive as they were sent
    *_PROXY,
)
_BUSY = (
    *("SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttl"),
    *("(500)", "(502)", "(503)", "(504)"),  # what the answer to a HEAD, which has no body, says instead
)
_FULL = ("QuotaExceeded", "StorageFull", "InsufficientStorage", "(507)")
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_LIMITS = {
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or use another file system",
    errno.ENAMETOOLONG: "shorten the name or the path",
    errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
    errno.ENFILE: "raise the limit of open files of this machine: sysctl fs.file-max",
}
# What a network file system says while its server restarts or fails over: the next try may find it there.
_PASSING = (errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EAGAIN, errno.EHOSTDOWN, errno.ENOTCONN)
# A role's credentials come from a service of the node, which restarts, and learns of a new role after seconds. It is
# asked again, as a store is: a training renews its credentials every hour, and 77 would end it for good.
_METADATA = ("MetadataRetrieval", "credentials from container-role", "credentials from iam-role")

# They log the traceback of every failed sign-in, which is told in two lines once it is final.
for _name in ("botocore", "aiobotocore"):
    logging.getLogger(_name).addHandler(logging.NullHandler())


def is_silence(error: BaseException) -> bool:
    """Whether the store did not answer, so that asking again may help."""
    if isinstance(error, FusionError | FileNotFoundError | PermissionError):
        return False
    if named(error, _METADATA):
        return True
    if named(error, _DENIED) or _mistake(error):
        return False
    if isinstance(error, ConnectionError | TimeoutError) or named(error, _SILENT + _BUSY):
        return True
    # An error of S3 that s3fs does not know is EIO to it.
    return isinstance(error, OSError) and error.errno in _PASSING and _answer(error) is None


def is_unreachable(error: BaseException) -> bool:
    """Whether nothing listens at the store's address, or its name is unknown: as after a wrong setting."""
    return named(error, ("EndpointConnection", *_PROXY)) and not named(error, ("ConnectTimeout",))


def is_unsupported(error: BaseException) -> bool:
    """Whether the store says that it has no such operation, or takes no such header."""
    return named(error, _UNSUPPORTED)


def _answer(error: BaseException) -> BaseException | None:
    """botocore's own error, when the store answered with one."""
    return next((link for link in _chain(error) if hasattr(link, "operation_name")), None)


def is_absence(url: str, error: Exception) -> bool:
    """Whether the object is missing, and not a file or program of this machine that credentials come from.

    Only the system names the file in the error.
    """
    return getattr(error, "filename", None) is None or not url.startswith(("s3://", "s3a://"))


def is_answer(error: BaseException) -> bool:
    """Whether an error comes from the store, or its silence, and not from the bytes that were read."""
    missing = isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError)
    return missing or is_silence(error) or named(error, _DENIED) or bool(_mistake(error))


def explained(url: str, error: Exception) -> Exception:
    """The error that a user gets; a bug is returned as it is."""
    if isinstance(error, FusionError):
        return error
    cause = _cause(error)
    if is_full(error):
        return UnreachableError(f"no space is left for {url} ({cause})", "free some, then run it again")
    missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if missing and is_absence(url, error):
        return _missing(url, error)
    if remedy := _mistake(error):
        return ConfigError(f"{url} cannot be opened ({cause})", remedy)
    if missing or _is_refusal(error):
        return CredentialsError(
            f"no access to {url} ({cause})", "check credentials, their expiry and their permissions"
        )
    if is_silence(error):
        return UnreachableError(f"{url} does not answer ({cause})", _where_to_look(error))
    return error


def is_full(error: BaseException) -> bool:
    """Whether a disk, a quota or a bucket is full.

    That is 69 wherever it happens: room comes back without any change of the settings, so a scheduler may try again.
    """
    return named(error, _FULL) or (isinstance(error, OSError) and error.errno in _FULL_DISK)


def is_no_bucket(error: BaseException) -> bool:
    """Whether it is the bucket that does not exist, and not only an object or folder in it."""
    return named(error, ("NoSuchBucket",))


def _missing(url: str, error: BaseException) -> DataError:
    if is_no_bucket(error):
        bucket = url.partition("://")[2].split("/")[0]
        return DataError(f"there is no bucket {bucket} ({url})", "correct its name, or create it")
    return DataError(f"{url} does not exist ({_cause(error)})", "check the path for a misspelt folder or file name")


def reason_of(error: BaseException) -> str:
    """Why the store does not answer, as short as it can be said."""
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
    """What to do about a setting that is wrong; empty for any other error."""
    if named(error, _CHECKSUMS):
        return _without_checksums(error)
    if isinstance(error, OSError) and error.errno in _LIMITS:
        return _LIMITS[error.errno]
    return next((remedy for remedy, names in _MISTAKES.items() if named(error, names)), "")


def _without_checksums(error: BaseException) -> str:
    operation = getattr(_answer(error), "operation_name", "")
    is_reading = operation.startswith(("Get", "Head"))
    name = "AWS_RESPONSE_CHECKSUM_VALIDATION" if is_reading else "AWS_REQUEST_CHECKSUM_CALCULATION"
    return f"set {name}=when_required: this store refuses the checksums that the client adds"


def _cause(error: BaseException) -> str:
    """The first line that says something."""
    said = str(error).removeprefix("Parameter validation failed:\n")
    return f"{type(error).__name__}: {said}".splitlines()[0]


def named(error: BaseException, names: tuple[str, ...]) -> bool:
    """Whether the error, or what led to it, is of such a name or says one of them."""
    said = " ".join(f"{type(link).__name__} {link}" for link in _chain(error))
    return any(name in said for name in names)


def _chain(error: BaseException) -> list[BaseException]:
    return [link for link in (error, error.__cause__, error.__context__) if link is not None]
