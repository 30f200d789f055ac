"""Settings are written down and passed on; passwords in them are not."""

from __future__ import annotations

import re

_PASSWORD = re.compile(r"(://[^/\s:@]*):[^/\s@]*@")


def hide_passwords(words: str) -> str:
    """scheme://user:secret@host becomes scheme://user:***@host."""
    return _PASSWORD.sub(r"\1:***@", words)
