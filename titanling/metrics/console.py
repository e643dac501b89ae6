"""Lines on the terminal: coloured there, plain in a pipe or a file, never wrapped, never a vehicle for escape codes."""

import os
import re
import sys
from collections.abc import Sequence
from typing import TextIO

# Control characters but tab and newline, lone surrogates, and what reorders or breaks lines: text that a model wrote
# or that came from a file must not move the cursor, set the title or hide a part of a line.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

Piece = tuple[str, str]
"""Text and its rich style ("" for none)."""


def escape_controls(text: str) -> str:
    r"""`text` with unsafe characters written as `\x1b` or `\u202e`; tab and newline stay."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


class Console:
    """Prints lines to stdout, and warnings to stderr.

    Args:
        colour: Allow colours. They are used only if the stream is a terminal and NO_COLOR is unset or empty.
    """

    def __init__(self, colour: bool) -> None:
        self._colour = colour and not os.environ.get("NO_COLOR")

    def line(self, pieces: Sequence[Piece]) -> None:
        """Print one line made of `pieces` to stdout and flush it."""
        self._write(sys.stdout, pieces)

    def warning(self, message: str) -> None:
        """Print "warning: `message`" to stderr and flush it."""
        self._write(sys.stderr, [("warning: ", "bold yellow"), (message, "yellow")])

    def _write(self, stream: TextIO, pieces: Sequence[Piece]) -> None:
        safe = [(escape_controls(text), style) for text, style in pieces]
        if self._colour and stream.isatty():
            _write_coloured(stream, safe)
            return
        line = "".join(text for text, _ in safe) + "\n"
        # A stream that cannot hold a character (LANG=C) must not stop a run.
        encoding = stream.encoding or "utf-8"
        stream.write(line.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()


def _write_coloured(stream: TextIO, pieces: Sequence[Piece]) -> None:
    # rich takes 0.1 s to import and is of no use in a batch job.
    from rich.console import Console as RichConsole
    from rich.text import Text

    # soft_wrap: rich would otherwise cut or wrap at the terminal's width. Text objects are not parsed for markup.
    RichConsole(file=stream, highlight=False).print(Text.assemble(*pieces), soft_wrap=True)
    stream.flush()
