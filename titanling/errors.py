"""The one exception type that means: the user can mend this. And the exit code of what came to nothing."""

FAILED_NUMERICALLY = 3
"""Exit code of a run whose steps update nothing any more: the same command would do the same."""


class UserError(Exception):
    """Wrong input from the user: a config, a file, a checkpoint, a topology.

    The message is one line that names the file, key and value and how to mend it. Commands turn it into exit
    code 2 without a traceback; every other exception is a bug of ours and keeps its traceback.
    """
