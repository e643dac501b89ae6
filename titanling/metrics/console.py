"""Lines on the terminal: coloured there, plain in a pipe or a file, never wrapped, never a vehicle for escape codes."""

import os
import sys
from collections.abc import Sequence
from typing import TextIO

from titanling.text import escape_controls

Piece = tuple[str, str]
"""Text and its rich style ("" for none)."""


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
