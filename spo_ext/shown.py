"""What comes from outside, made fit to be shown: in a terminal, a log, a report or a plan.

Prompts, completions, columns and reasons may hold characters that steer a terminal or turn a line
around, and the URL of a database its password. Whatever prints or keeps them calls this.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO
from urllib.parse import unquote_plus

HIDDEN = "***"

# C0 and C1 but for tab and newline, marks and overrides of direction, line ends of Unicode, and
# halves of surrogate pairs, which no stream can write.
_STEERING = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

_DATABASE_URL = re.compile(r"\s*[\w+.-]*(?:sql|postgres)[\w+.-]*://", re.IGNORECASE)
_NAME = r"\w*(?:passw\w*|passphrase|pwd|secret|api_?key)"
# Of keywords as libpq has them, and of JSON or a printed dict.
_KEYWORD = re.compile(
    rf"(?i)\b({_NAME}(?:\s*=\s*|[\"']\s*:\s*))(?!\*\*\*)"
    r"('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[^\s&,;'\"]+)"
)
SECRET_NAME = re.compile(
    r"(?:pass(?!file$)\w*|pwd|secret|token|key|credentials?|conninfo)$", re.IGNORECASE
).search
# The user, then up to the last @: a password may hold any other character unquoted. A text that is
# the URL of a database goes to its end; in the midst of others a URL ends at a space.
_USER, _QUERY = (
    {whole: re.compile(form % kind) for whole, kind in ((False, short), (True, long))}
    for form, short, long in (
        (r"(://[^\s:@]*):(?!\*\*\*@)%s*@", r"\S", "."),
        (r"([?&])([^=&?\s]+)=(?!\*\*\*)(%s*)", r"[^&\s]", r"[^&\n]"),
    )
)


def hide_passwords(words: str) -> str:
    """The same with *** for passwords and other secrets, however a URL or keywords state them.

    scheme://user:secret@host?password=secret becomes scheme://user:***@host?password=***.
    """
    whole = _DATABASE_URL.match(words) is not None
    words = _USER[whole].sub(rf"\1:{HIDDEN}@", words)
    if "://" in words:
        words = _QUERY[whole].sub(_hide_value, words)
    return _KEYWORD.sub(rf"\1{HIDDEN}", words)


def _hide_value(found: re.Match[str]) -> str:
    before, name, value = found.groups()
    plain = unquote_plus(value)
    if SECRET_NAME(unquote_plus(name)) or (plain != value and hide_passwords(plain) != plain):
        value = HIDDEN
    return f"{before}{name}={value}"


def visible(words: str, *, line: bool = False) -> str:
    """The same with what steers a terminal, or turns text around, spelled out: \\x1b for ESC.

    Tabs and ends of lines stay; where it must be one line, they are spelled out too.
    """
    words = words if line else words.replace("\r\n", "\n")
    words = _STEERING.sub(_spelled, words)
    return re.sub("[\t\n]", _spelled, words) if line else words


def _spelled(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def say(words: object, file: TextIO | None = None, *, line: bool = False) -> None:
    """Prints, on the standard output unless told otherwise, what may come from outside."""
    print(visible(hide_passwords(str(words)), line=line), file=file or sys.stdout, flush=True)
