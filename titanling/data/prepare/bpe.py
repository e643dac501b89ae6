"""Runs tokenizers' BPE trainer: words of any length take no longer than others, and signals are heeded meanwhile."""

import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import PreTokenizer, Sequence, Split
from tokenizers.trainers import BpeTrainer

LONGEST = 1024
"""What is longer than so many bytes (byte-level) or characters without a break is cut, for training only. The trainer's
time grows with the square of a word's length: for 10 MB of `aaaa…`, hours."""
PIECE = 64 * LONGEST
"""Characters of a run that go to the library together: its time to cut one grows with the square of that, too."""
_RUNS = re.compile(r"[^\W\d_]+|\d+|\s+|(?:[^\w\s]|_)+")
"""Each within a word."""
_SPACES = re.compile(rf"\s{{{LONGEST},}}")
LINE_SECONDS = 10
WAIT_SECONDS = 0.1
LET_GO_SECONDS = 2.0


class _Interrupted(Exception):
    """The texts end here, for the training was given up."""


def train_bpe(tokenizer: Tokenizer, texts: Iterable[str], trainer: BpeTrainer) -> None:
    """Train a tokenizer whose pre-tokenizer says what words are.

    Says on stderr how far it is, if it takes long, and how much was cut. Ctrl-C ends it at once: the trainer, which
    knows no signals, runs in a thread. Raises what `texts` raises.
    """
    words = tokenizer.pre_tokenizer
    feed = _Feed(texts, words)
    failed: list[BaseException] = []

    def train() -> None:
        try:
            tokenizer.train_from_iterator(feed, trainer)
        except BaseException as error:
            failed.append(error)

    tokenizer.pre_tokenizer = Sequence([words, Split(Regex(f"(?m).{{{LONGEST}}}"), "isolated")])
    thread = threading.Thread(target=train, name="tokenizer", daemon=True)
    thread.start()
    try:
        _wait(thread, feed)
    except BaseException:
        feed.stop()
        raise
    if failed:
        raise feed.error or failed[0]
    tokenizer.pre_tokenizer = words
    if feed.cut:
        print(
            f"tokenizer: {feed.cut / 1e6:,.3g} million characters without a break ({LONGEST:,} or more each: base64,"
            " DNA?) were cut into pieces for its training; filter such text out if it should not shape the vocabulary",
            file=sys.stderr,
            flush=True,
        )


def _wait(thread: threading.Thread, feed: "_Feed") -> None:
    """Wait for the end of the training in such a way that signals are heeded; say how far it is."""
    start = told = time.monotonic()
    while thread.is_alive():
        thread.join(WAIT_SECONDS)
        now = time.monotonic()
        if now - told >= LINE_SECONDS:
            told = now
            what = "reads its text" if feed.reading else "learns merges"
            seconds = f"{now - start:,.0f} s"
            print(f"tokenizer: {what}, {feed.bytes / 1e6:,.0f} MB so far, {seconds}", file=sys.stderr, flush=True)


class _Feed:
    """The texts, counted as they are read by the trainer's thread."""

    def __init__(self, texts: Iterable[str], words: PreTokenizer) -> None:
        self._texts, self._words = texts, words
        self._stopped, self._over = threading.Event(), threading.Event()
        self.bytes = self.cut = 0
        self.error: BaseException | None = None

    @property
    def reading(self) -> bool:
        """Whether there are texts left."""
        return not self._over.is_set()

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                for piece in _pieces(text):
                    if self._stopped.is_set():
                        raise _Interrupted
                    self.bytes += len(piece)
                    self.cut += self._beyond(piece)
                    yield piece
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._over.set()

    def stop(self) -> None:
        """End the texts, and wait until their thread runs no Python any more, which must not outlive the interpreter.

        What the library does then in its own threads ends with the process.
        """
        self._stopped.set()
        self._over.wait(LET_GO_SECONDS)

    def _beyond(self, text: str) -> int:
        """Characters of the text in words that are cut."""
        # Few texts have anything as long between white space, and only those are looked at word by word.
        runs = [run for run in text.split() if 4 * len(run) > LONGEST]
        if len(text) >= LONGEST:
            runs += _SPACES.findall(text)
        words = (word for run in runs for word, _ in self._words.pre_tokenize_str(run))
        return sum(len(word) for word in words if len(word) > LONGEST)


def _pieces(text: str) -> Iterator[str]:
    """The text, cut only within words that are cut anyway."""
    start = 0
    for run in _RUNS.finditer(text) if len(text) > PIECE else ():
        for place in range(run.start() + PIECE, run.end(), PIECE):
            yield text[start:place]
            start = place
    yield text[start:]
