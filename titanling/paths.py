"""Paths as users write them: `~` and `$VAR` mean the same for every key of a config and every argument of a script."""

import os
import re

from titanling.errors import UserError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([^{}]+)\})")


def expand(text: str) -> str:
    """`text` as a shell would expand it. Raises UserError for what `try_expand` refuses."""
    try:
        return try_expand(text)
    except ValueError as error:
        raise UserError(f"{text}: {error}") from None


def try_expand(text: str) -> str:
    """`text` with a leading `~` or `~user` and all `$VAR` and `${VAR}` replaced; a URL stays as it is.

    Raises ValueError, with what is wrong as a clause, for a user or a variable that there is not, and for NUL.
    """
    if "\0" in text:
        raise ValueError("no path holds a NUL character")
    if "://" in text:
        return text
    expanded = os.path.expanduser(_VARIABLE.sub(_value, text))
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(f"{user} is nobody's home folder here; write ./{user} for a file of that name")
    if expanded != text and os.path.lexists(text) and not os.path.lexists(expanded):
        raise ValueError(f"stands for {expanded}, which is not there; what has this very name here: move it there")
    return expanded


def _value(found: re.Match[str]) -> str:
    name = found[1] or found[2]
    value = os.environ.get(name, "")
    if not value:
        raise ValueError(f"the environment variable {name} is {'empty' if name in os.environ else 'not set'}; set it")
    if "$" in value or "\0" in value:
        raise ValueError(f"the environment variable {name} holds a $ itself; write the path out")
    return value
