"""What every command does around its own work: user errors become one line and exit code 2."""

import argparse
import atexit
import errno
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from titanling import terminal
from titanling.errors import UserError
from titanling.interrupts import Interruption
from titanling.paths import expand
from titanling.ranks import Process, launched, this_process
from titanling.text import escape_controls, escape_json, one_line

# What the user can mend: the disk is full, over quota, mounted read-only, or its permissions forbid us.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


def _without_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A command that is interrupted while it still imports what it needs ends in a word."""
    if issubclass(kind, KeyboardInterrupt):
        with suppress(OSError, ValueError, AttributeError):
            print("interrupted", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _without_traceback


def run(main: Callable[[], int | None], if_interrupted: str = "", reports: bool = False) -> None:
    """Run `main` and exit with its code (None is 0).

    `UserError` and a full or forbidden disk become one line on stderr and exit code 2, without a traceback.
    A signal (Ctrl-C, SIGTERM, SIGHUP) ends it within moments, with "interrupted" and the words of `if_interrupted`, and
    128 + its number. What stdout cannot take is an error, too, unless `main` only `reports` there: its results are
    files, and a full disk or a reader that has left must not end its work. What stderr cannot take never is.
    Under a launcher every rank meets the same error, so rank 0 speaks first and the others only if they are still
    there after a moment. `if_interrupted`: what to say then, of what there is and of the same command.
    """
    terminal.make_ready()
    terminal.report_to("stderr")
    if reports:
        terminal.report_to("stdout")
    interruption = Interruption(if_interrupted)
    if threading.current_thread() is threading.main_thread():
        interruption.install()
    code: int | None = 1
    if launched():
        atexit.register(lambda: _end_with(code))  # called after all that others, torch say, will register
    try:
        code = main()
        sys.stdout.flush()
    except UserError as error:
        code = _refuse(str(error)) if interruption.number is None else interruption.end()
    except SystemExit as end:  # argparse's
        code = end.code if not isinstance(end.code, str) else 1
        _flush_results()
        raise
    except BrokenPipeError:
        code = 1  # whoever read our output (head, less) has left
    except OSError as error:
        if interruption.number is not None:
            interruption.end()
        code = _refuse(_disk_words(error))
    except BaseException as error:
        if interruption.number is not None:
            interruption.end()
        if not isinstance(error, KeyboardInterrupt):  # a program's own
            raise
        print(f"interrupted{if_interrupted and f'; {if_interrupted}'}", file=sys.stderr, flush=True)
        code = 130
    sys.exit(_flush_results() or code or 0)


def _flush_results() -> int:
    """Write out what stdout still holds: 2, said, if that fails. The interpreter's own last flush then cannot."""
    try:
        sys.stdout.flush()
        return 0
    except (OSError, ValueError) as error:
        terminal.give_up(1)
        return 0 if isinstance(error, (BrokenPipeError, ValueError)) else _refuse(_disk_words(error))


def _disk_words(error: OSError) -> str:
    """What is wrong with the disk, or with stdout, in words. Raises the error if the user can do nothing about it."""
    if error.filename is None and _stdout_fails():
        return f"stdout: cannot be written: {error.strerror}; give the command a place to write to, and run it again"
    if error.errno not in DISK_ERRORS:
        raise error
    return f"{error.filename or 'disk'}: {error.strerror}; free space or mend permissions, then run again"


def _stdout_fails() -> bool:
    try:
        sys.stdout.flush()
        os.write(1, b"")
    except (OSError, ValueError):
        terminal.give_up(1)
        return True
    return False


def say(text: str = "") -> None:
    """Print to stdout what may hold somebody else's words: names of files, what a model wrote. None is a command."""
    print(escape_controls(text), flush=True)


def say_json(value: Any) -> None:
    """Print a value as one line of JSON, with the same characters escaped as JSON writes them."""
    print(escape_json(json.dumps(value, ensure_ascii=False)), flush=True)


def warn(lines: Iterable[str]) -> None:
    """Print warnings to stderr, a line each; of several ranks the first does."""
    if _me().rank == 0:
        for line in lines:
            print(f"warning: {one_line(line)}", file=sys.stderr, flush=True)


def _me() -> Process:
    """This process, as far as its launcher's words make sense: that they do not may be what is to be said."""
    with suppress(UserError):
        return this_process()
    return Process()


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what files of text are: None where they are not given."""
    parser.add_argument(
        "--format",
        choices=("auto", "text", "jsonl", "json", "csv", "parquet", "arrow"),
        help="what all files of text are (default: auto, what each one's content shows)",
    )
    parser.add_argument(
        "--document-separator",
        type=lambda text: text.replace("\\n", "\n"),
        metavar="TEXT",
        help="plain text: what stands between documents, as '<|endoftext|>' or '\\n\\n' (default: nothing)",
    )


def _end_with(code: int | None) -> None:
    """End this rank without taking the interpreter down.

    gloo's threads release the last collective's tensors when it suits them. One that is about to do so when it can no
    longer have the interpreter's lock aborts the process, which had done everything that it was asked.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader has left; it was closed
            stream.flush()
    os._exit(code or 0)


def local_path(text: str) -> Path:
    """A path of this machine, for a script's arguments. Raises UserError for a URL, whose name a path would mangle."""
    if "://" in text:
        raise UserError(f"{text}: must be a path of this machine, not a URL; copy it there yourself")
    return Path(path_or_url(text))


def path_or_url(text: str) -> str:
    """A path or a URL, for a script's arguments: ~ and $VAR are expanded where the shell has not (--output=~/x).

    Raises UserError for an empty one, and as `titanling.paths.expand` does.
    """
    if not text:
        raise UserError('command line: "" is no path; give one')
    return expand(text)


def _refuse(message: str) -> int:
    """Say what is wrong on one line; return the exit code."""
    me = _me()
    # The first rank of a node comes before the others there, which its launcher ends then.
    time.sleep(3 * (me.rank > 0) + 3 * (me.local_rank > 0))
    who = f"error (rank {me.rank})" if me.rank else "error"
    print(f"{who}: {one_line(message)}", file=sys.stderr, flush=True)
    return 2
