"""Text that came from elsewhere, made harmless for a terminal or a log."""

import json
import re
from typing import Any

# Control characters but tab and newline, lone surrogates, and what reorders or breaks lines: text that a model wrote
# or that came from a file must not move the cursor, set the title or hide a part of a line.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

LONGEST_WORD, LONGEST_LINE = 400, 3000
"""Characters of a message; a path has fewer than the first."""


def escape_controls(text: str) -> str:
    r"""`text` with unsafe characters written as `\x1b` or `\u202e`; tab and newline stay."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def escape_json(text: str) -> str:
    r"""The same for JSON text, which stays JSON: `\u001b`."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def shorten(text: str, limit: int = 200) -> str:
    """`text`, without its middle if it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    head = 2 * limit // 3
    return f"{text[:head]} … {text[len(text) - (limit - head - 3) :]}"


def show(value: Any) -> str:
    """A value of a config as messages show it: as JSON, shortened."""
    try:
        return shorten(json.dumps(value, ensure_ascii=False, default=str))
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in each other without end
        return f"(a very long {type(value).__name__})"


def one_line(text: str) -> str:
    """`text` as a message on one line: harmless, and no longer than one reads, whatever it quotes."""
    words = (shorten(word, LONGEST_WORD) for word in escape_controls(text).split())
    return shorten(" ".join(words), LONGEST_LINE)
