"""Passwords and tokens inside of addresses: finds them, and removes them from a text that will be shown or written.

In: any text. Out: the same text, in which http://user:password@host/web?sig=abc has become http://host/web?sig=…

Every error goes through here (`errors.MegatronPatchError`), and so does every traceback that the program prints itself, because whoever
raises an error need not know that an address in its text has a password. Data at such an address is refused before anything is recorded.
"""

from __future__ import annotations

import re
from typing import Any

# What an address begins with. Without the kind too (//user:password@host), and with one slash: mistyped secrets are secrets. Then what
# the name of a value begins with, and what it ends with. Kinds and names are looked up backward: searching forward for them takes
# quadratic time in a long word.
_TOKEN = re.compile(r"""(:/+)|(?<![:/])//|([?&;#])|([=\s"'<>])""")
_KIND = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+\Z")
_LONGEST_KIND = 40
_SERVER = re.compile(r"""[^/?#\s"'<>,)}]*""")
_PORT = re.compile(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?")
_VALUE = re.compile(r"""[^&\s"'<>]*""")
_SECRET_NAMES = re.compile(
    r"sig|sas|code|pwd|.*key|auth.*|.*(signature|token|secret|passw|credential|session|(api|access|account)[-_]?key).*|x-(amz|goog|ms)-.*",
    re.I,
)
# Kinds whose addresses have no user names: what is before the @ is a key or a token.
_LOCAL = ("file", "local", "memory")
_WITHOUT_USERS = ("http", "https", "s3", "s3a", "s3n")
_WEB = ("http", "https")


def has_credentials(text: str) -> bool:
    """Returns whether a text contains an address with a password, a token or a signature."""
    return any(_cleaned(line, every_web_value=False) != line for line in text.splitlines(keepends=True))


def without_credentials(text: str) -> str:
    """Returns a text in which addresses have no user names with passwords, and no values of a query that may be secret."""
    if "//" not in text and ":/" not in text:
        return text
    return "".join(_cleaned(line, every_web_value=True) for line in text.splitlines(keepends=True))


def cleaned_record(value: Any) -> Any:
    """Returns JSON values whose texts and keys are without credentials; earlier versions recorded addresses as they were given."""
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, (list, tuple)):
        return [cleaned_record(item) for item in value]
    if isinstance(value, dict):
        return {without_credentials(key): cleaned_record(item) for key, item in value.items()}
    return value


def _cleaned(line: str, every_web_value: bool) -> str:
    """Returns a line without credentials. It takes linear time in the length of the line.

    Args:
        line: the line.
        every_web_value: whether to remove all values of a web address: only its server knows which of them are secret.
    """
    kept: list[str] = []
    done = position = end = 0  # `kept` has what is before `done`; `end` is the end of the last address' word
    name = 0  # where the name of a value begins; 0: there is none
    web, last_at = False, line.rfind("@")
    while (found := _TOKEN.search(line, position)) is not None:
        position = found.end()
        if found[2]:
            name = position
        elif not found[3]:
            kind = _kind_before(line, found.start()) if found[1] else ""
            if kind is None:
                continue
            if position > end:
                end, web, name = _end_of_word(line, position), False, 0
            web = web or kind in _WEB
            after = _after_secret_user(line, position, end, kind, last_at)
            if after > position:
                kept.append(line[done:position])
                done = position = after
                end = end if position <= end else _end_of_word(line, position)
        else:
            given = line[name : found.start()] if name and found[3] == "=" and found.start() < end else ""
            name = 0
            if given and ((web and every_web_value) or _SECRET_NAMES.fullmatch(given)):
                kept.append(f"{line[done:position]}…")
                value = _VALUE.match(line, position)
                assert value is not None
                done = position = value.end()
    return "".join([*kept, line[done:]])


def _kind_before(line: str, position: int) -> str | None:
    found = _KIND.search(line[max(0, position - _LONGEST_KIND) : position])
    return None if found is None else found[0].lower()


def _end_of_word(line: str, start: int) -> int:
    end = line.find(" ", start)
    return len(line) if end < 0 else end


def _after_secret_user(line: str, start: int, end: int, kind: str, last_at: int) -> int:
    """Returns where the name of the server begins, after `user:password@`; `start` if no secret is before it.

    Args:
        line: the line.
        start: the end of the address' kind and its slashes.
        end: the end of the address' word.
        kind: the kind in small letters; "": there is none.
        last_at: where the last @ of the line is.
    """
    if kind in _LOCAL:
        return start
    server = _SERVER.match(line, start)
    assert server is not None
    user, at, _ = server[0].rpartition("@")
    if at:
        return line.rindex("@", start, end) + 1 if ":" in user or kind in _WITHOUT_USERS else start
    # A password may have characters that end the name of a server, or a space: then what follows the colon is no port.
    if last_at >= start and _PORT.fullmatch(server[0]) is None:
        inside = line.rfind("@", start, end)
        return (inside if inside >= 0 else line.index("@", start)) + 1
    return start
