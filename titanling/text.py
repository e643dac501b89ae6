"""Text that came from elsewhere, made harmless for a terminal or a log."""

import re

# Control characters but tab and newline, lone surrogates, and what reorders or breaks lines: text that a model wrote
# or that came from a file must not move the cursor, set the title or hide a part of a line.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str) -> str:
    r"""`text` with unsafe characters written as `\x1b` or `\u202e`; tab and newline stay."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
