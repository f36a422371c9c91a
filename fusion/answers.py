"""What a store's answers mean: silence, which is asked again, or an error with an exit code, a cause and what to do.

Stores and their client say it by the name of an exception or in its text; `fusion.storage` asks here what it is.
"""

from __future__ import annotations

import errno
import logging

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
}
_SILENT = (
    *("EndpointConnection", "ConnectTimeout", "ReadTimeout", "ConnectionClosed", "HTTPClient", "ClientConnect"),
    *("ClientPayload", "ResponseStreaming", "ResponseParser"),  # an answer that broke off, or is no XML
)
_BUSY = (
    *("SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttl"),
    *("(500)", "(502)", "(503)", "(504)"),  # what the answer to a HEAD, which has no body, says instead
)
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
    return isinstance(error, ConnectionError | TimeoutError) or named(error, _SILENT + _BUSY)


def is_absence(url: str, error: Exception) -> bool:
    """Whether the object is missing, and not a file or program of this machine that credentials come from.

    Only the system names the file in the error.
    """
    return getattr(error, "filename", None) is None or not url.startswith("s3://")


def is_answer(error: BaseException) -> bool:
    """Whether an error comes from the store, or its silence, and not from the bytes that were read."""
    missing = isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError)
    return missing or is_silence(error) or named(error, _DENIED) or bool(_mistake(error))


def explained(url: str, error: Exception) -> Exception:
    """The error that a user gets; a bug is returned as it is."""
    if isinstance(error, FusionError):
        return error
    cause = _cause(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return UnreachableError(f"no space is left for {url} ({cause})", "free some, then run it again")
    missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if missing and is_absence(url, error):
        return DataError(f"{url} does not exist ({cause})", "check the bucket and path; --data and --output name them")
    if remedy := _mistake(error):
        return ConfigError(f"{url} cannot be opened ({cause})", remedy)
    if missing or _is_refusal(error):
        return CredentialsError(
            f"no access to {url} ({cause})", "check credentials, their expiry and their permissions"
        )
    if is_silence(error):
        return UnreachableError(f"{url} does not answer ({cause})", "check endpoint and network, then run it again")
    return error


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, PermissionError) or named(error, _DENIED) or getattr(error, "errno", 0) == errno.EROFS


def _mistake(error: BaseException) -> str:
    """What to do about a setting that is wrong; empty for any other error."""
    return next((remedy for remedy, names in _MISTAKES.items() if named(error, names)), "")


def _cause(error: Exception) -> str:
    """The first line that says something."""
    said = str(error).removeprefix("Parameter validation failed:\n")
    return f"{type(error).__name__}: {said}".splitlines()[0]


def named(error: BaseException, names: tuple[str, ...]) -> bool:
    """Whether the error, or what led to it, is of such a name or says one of them."""
    chain = [error, error.__cause__, error.__context__]
    said = " ".join(f"{type(link).__name__} {link}" for link in chain if link is not None)
    return any(name in said for name in names)
