"""What every command does around its own work: user errors become one line and exit code 2."""

import errno
import os
import sys
import time
from collections.abc import Callable

# What the user can mend: the disk is full, over quota, mounted read-only, or its permissions forbid us.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


def run(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its code (None is 0).

    `UserError` and a full or forbidden disk become one line on stderr and exit code 2, without a traceback.
    Under a launcher every rank meets the same error, so rank 0 speaks first and the others only if they are still
    there after a moment.
    """
    from titanling.errors import UserError

    try:
        code = main()
        sys.stdout.flush()
    except UserError as error:
        code = _refuse(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        code = 130
    except BrokenPipeError:
        # Whoever read our output (head, less) has left; the interpreter's last flush must not fail on it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        code = _refuse(f"{error.filename or 'disk'}: {error.strerror}; free space or mend permissions, then run again")
    sys.exit(code or 0)


def _refuse(message: str) -> int:
    """Say what is wrong on one line; return the exit code."""
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    # The first rank of a node comes before the others there, which its launcher ends then.
    time.sleep(3 * (rank > 0) + 3 * (local_rank > 0))
    who = f"error (rank {rank})" if rank else "error"
    print(f"{who}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2
