"""Which addresses of remote data are accepted. In: an address such as s3://bucket/web. Out: nothing, or a DataError.

An address is written to logs and checkpoints, so it must contain no secret; and it must name a file, not a way to make one out of others.
What a secret looks like is in `credentials.py`.
"""

from __future__ import annotations

from megatron_patch.credentials import has_credentials, without_credentials
from megatron_patch.errors import DataError

# Kinds of addresses for which fsspec interprets the content of other files, or calls other programs. Some of its versions run code in it.
_INTERPRETING = {
    *("reference", "generic", "dask", "jupyter", "jlab", "zip", "tar", "libarchive", "dir"),
    *("data", "cached", "blockcache", "filecache", "simplecache", "async_wrapper", "asyncwrapper", "git", "dvc"),
}


def check_address(address: str) -> None:
    """Checks that an address names a file on a server, and no secret.

    Raises:
        DataError: it contains a password, or combines or interprets other files.
    """
    kind, _, rest = address.lower().partition("://")
    check_no_credentials(address)
    if kind in ("http", "https") and "?" in rest and "=" in rest:
        raise _with_credentials(address)
    if "::" in address or kind in _INTERPRETING:
        raise DataError(
            f"{address} does not name a file on a server",
            "addresses such as s3://bucket/web; none that combine others (::), or that make files from a description, as reference:// does",
            "copy or unpack the files, and give their own address",
        )


def check_no_credentials(text: str, source: str = "") -> None:
    """Checks that a text, of which an address may be a part, contains no password and no token in an address.

    Args:
        text: a word of the command line, a line of a list, or an address.
        source: where it is from, for the message; "": an address.

    Raises:
        DataError: it contains one; the message does not repeat it.
    """
    if has_credentials(text):
        raise _with_credentials(text, source)


def _with_credentials(text: str, source: str = "") -> DataError:
    return DataError(
        f"{source}{without_credentials(text)[:300]} contains a password, a token or a query, which would be written to logs and "
        "checkpoints",
        "addresses without credentials",
        "give them as the package for this kind of address reads them: in variables such as AWS_ACCESS_KEY_ID, or in its own file",
    )
