"""Runs a module as `python -m` does, but without the working folder among those that Python imports from.

    python titanling/start.py titanling.train --config FILE

What lies where a user happens to stand, a tomli.py say, is no part of the program. Python's own way, -P, needs 3.11.
"""

import sys


def main() -> None:
    """Run the module that the first argument names, with the others."""
    own = __file__.rpartition("/")[0]
    root = own.rpartition("/")[0]
    # Python puts this file's folder first, whose modules are not to be imported by their bare names.
    sys.path[:] = [path for path in sys.path if path not in ("", own)]
    if root not in sys.path:
        sys.path.insert(0, root)
    del sys.argv[0]

    import os
    import runpy

    os.environ["PYTHONSAFEPATH"] = "1"  # of what this process starts, from Python 3.11 on
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
