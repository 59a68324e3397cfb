"""Passwords and tokens inside of addresses: finds them, and removes them from a text that will be shown or written.

In: any text. Out: the same text, in which http://user:password@host/web?sig=abc has become http://host/web?sig=…

Every error goes through here (`errors.MegatronPatchError`), and so does every traceback that the program prints itself, because whoever
raises an error need not know that an address in its text has a password. Data at such an address is refused before anything is recorded.
"""

from __future__ import annotations

import re
from typing import Any

# What an address begins with. Without the kind too (//user:password@host), and with one slash: mistyped secrets are secrets.
_START = re.compile(r"(?:([A-Za-z][A-Za-z0-9+.-]+):/+|(?<![:/])//)")
_SERVER = re.compile(r"""[^/?#\s"'<>,)}]*""")
_PORT = re.compile(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?")
_VALUE = re.compile(r"""([?&;#])([^=&?;#\s"'<>]+)=([^&\s"'<>]*)""")
_SECRET_NAMES = re.compile(
    r"sig|sas|code|key|pwd|auth.*|.*(signature|token|secret|passw|credential|session|api[-_]?key|access[-_]?key).*|x-(amz|goog|ms)-.*", re.I
)
# The name of any value of a web address may be one that only its server knows to be a secret.
_WEB_VALUE = r"\1\2=…"
# Kinds whose addresses have no user names: what is before the @ is a key or a token.
_LOCAL = ("file", "local", "memory")
_WITHOUT_USERS = ("http", "https", "s3", "s3a", "s3n")


def has_credentials(text: str) -> bool:
    """Returns whether a text contains an address with a password, a token or a signature."""
    for line in text.splitlines():
        for start in _START.finditer(line):
            kind, rest = (start[1] or "").lower(), line[start.end() :]
            if _secret_user(kind, rest) or any(_SECRET_NAMES.fullmatch(found[2]) for found in _VALUE.finditer(rest.partition(" ")[0])):
                return True
    return False


def without_credentials(text: str) -> str:
    """Returns a text in which addresses have no user names with passwords, and no values of a query that may be secret."""
    if "//" not in text and ":/" not in text:
        return text
    return "".join(_cleaned(line) for line in text.splitlines(keepends=True))


def cleaned_record(value: Any) -> Any:
    """Returns JSON values whose texts and keys are without credentials; earlier versions recorded addresses as they were given."""
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, (list, tuple)):
        return [cleaned_record(item) for item in value]
    if isinstance(value, dict):
        return {without_credentials(key): cleaned_record(item) for key, item in value.items()}
    return value


def _cleaned(line: str) -> str:
    # From the last address of a line to its first, so that the rest of each one has been cleaned before.
    for start in reversed(list(_START.finditer(line))):
        kind, rest = (start[1] or "").lower(), line[start.end() :]
        rest = rest[_secret_user(kind, rest) :]
        address, space, after = rest.partition(" ")
        line = line[: start.end()] + _VALUE.sub(_WEB_VALUE if kind in ("http", "https") else _hidden, address) + space + after
    return line


def _hidden(found: re.Match[str]) -> str:
    return f"{found[1]}{found[2]}=…" if _SECRET_NAMES.fullmatch(found[2]) else found[0]


def _secret_user(kind: str, rest: str) -> int:
    """Returns the length of `user:password@` at the start of an address after its kind; 0 if there is none."""
    if kind in _LOCAL:
        return 0
    server = _SERVER.match(rest)
    assert server is not None
    user, at, _ = server[0].rpartition("@")
    word = rest.partition(" ")[0]
    if at:
        return word.rindex("@") + 1 if ":" in user or kind in _WITHOUT_USERS else 0
    # A password may have characters that end the name of a server, or a space: then what follows the colon is no port.
    if "@" in rest and _PORT.fullmatch(server[0]) is None:
        return (word.rindex("@") if "@" in word else rest.index("@")) + 1
    return 0
