"""Says in one line why a service could not be used. In: errors of the libraries of services. Out: sentences without passwords."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_patch.credentials import without_credentials
from megatron_patch.utils.console import shortened
from megatron_patch.utils.files import reason

_LONGEST = 300


def why(error: BaseException) -> str:
    """Returns the reason of an error, in one line."""
    text = without_credentials(reason(error)).strip() or type(error).__name__
    return shortened(text.splitlines()[0].rstrip(".:"), _LONGEST)


def not_reached(error: BaseException, server: str, patience: float) -> str | None:
    """Returns why a server could not be reached, if that is what an error of a library over `requests` means, otherwise None.

    Args:
        error: the error.
        server: address of the server.
        patience: seconds that it had for an answer.
    """
    from requests import exceptions
    from urllib3.exceptions import ReadTimeoutError

    server = without_credentials(server)
    for cause in _causes(error):
        if isinstance(cause, exceptions.SSLError):
            return None
        # Of a session with a limit of retries, the missing answer is the reason of a ConnectionError.
        inner = getattr(cause.args[0], "reason", None) if cause.args else None
        if isinstance(cause, exceptions.Timeout) or isinstance(inner, ReadTimeoutError):
            return f"{server} does not answer within {patience:g} s"
        if isinstance(cause, exceptions.ConnectionError):
            return f"there is no connection to {server}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
