"""JSON that is not one document a line: an array of objects, or objects over several lines. A document at a time."""

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

from titanling.data.prepare.reading import Reading, Span
from titanling.data.unpack import Unreadable, convert, one_line, open_unpacked

BLOCK = 1 << 20
_WHITE = " \t\r\n"


def json_values(span: Span, reading: Reading, first: int) -> Iterator[tuple[int, Any]]:
    """(number, value) of each from `first` on: of a file that begins with [, what is in that array, else its values.

    Raises Unreadable for a file that is no JSON: what comes behind the place cannot be told.
    """
    path = span.file.path
    with open_unpacked(path) as file:
        text = _Text(path, file, reading.longest_line, reading.longer)
        array = text.skip() == "["
        if array:
            text.take()
        number = 0
        while text.skip() and not (array and text.skip() == "]"):
            value = text.value(number)
            if number >= first:
                yield number, value
            number += 1
            if array and text.skip() == ",":
                text.take()
                if text.skip() in ("]", ""):
                    raise text.wrong(number, "a value must follow a comma")
            elif array and text.skip() != "]":
                raise text.wrong(number, "a comma or ] must follow" if text.skip() else "the array does not end")
        if array and text.take() != "]":
            raise text.wrong(number, "the array does not end")
        if array and text.skip():
            raise text.wrong(number, "something follows behind the array")


class _Text:
    """A file as text, of which a window is held: what is read and not yet taken."""

    def __init__(self, path: str, file: IO[bytes], limit: int, longer: str) -> None:
        self._path, self._file, self._limit, self._longer = path, file, limit, longer
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._held, self._place, self._over = "", 0, False

    def skip(self) -> str:
        """Leave out white space; the next character, or none at the end."""
        while True:
            while self._place < len(self._held):
                if self._held[self._place] not in _WHITE:
                    return self._held[self._place]
                self._place += 1
            if not self._more(BLOCK):
                return ""

    def take(self) -> str:
        """Leave out a character; which one."""
        self._place += 1
        return self._held[self._place - 1 : self._place]

    def value(self, number: int) -> Any:
        """The next value. Raises Unreadable."""
        size = BLOCK
        while True:
            try:
                value, end = self._json.raw_decode(self._held, self._place)
                if end < len(self._held) or not self._more(size):  # else a number might go on
                    self._place = end
                    return value
            except RecursionError:
                raise self.wrong(number, "too deep") from None
            except ValueError as error:
                # Broken, or what is held ends within it.
                place = getattr(error, "pos", 0)
                cut = str(error).startswith("Unterminated") or place > len(self._held) - 9
                if len(self._held) - self._place > self._limit:
                    raise self.wrong(number, f"more than {self._limit:,} bytes; {self._longer}") from None
                if not (cut and self._more(size)):
                    raise self.wrong(number, one_line(error)) from None
            size *= 2  # else a long document would be parsed once for each block

    def wrong(self, number: int, why: str) -> Unreadable:
        """What is wrong with the file."""
        return Unreadable(f"{self._path}: document {number + 1}: not JSON ({why}); correct the file")

    def _more(self, size: int) -> bool:
        """Hold more of the file; whether there is more."""
        if self._over:
            return False
        block = self._file.read(size)
        self._over = len(block) < size
        try:
            text = self._decoder.decode(block, self._over)
        except UnicodeDecodeError as error:
            raise Unreadable(
                f"{self._path}: not UTF-8 (byte 0x{error.object[error.start]:02x}); if it is Latin-1, convert it"
                f" ({convert(self._path, 'latin1')})"
            ) from None
        self._held, self._place = self._held[self._place :] + text, 0
        return bool(text)
