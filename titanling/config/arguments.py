"""The command line of a run: --config FILE and --table.key value."""

from typing import Any, NamedTuple, get_args, get_origin

from titanling.config.load import (
    COMMAND_LINE,
    Tree,
    hint_at,
    is_key,
    is_repeated,
    known_tables,
    nearest,
    unknown_key,
    without_places,
)
from titanling.config.toml import parse_toml
from titanling.config.torchtitan import is_torchtitan_key
from titanling.errors import UserError
from titanling.text import shorten


class Arguments(NamedTuple):
    """A parsed command line."""

    config: str | None
    overrides: Tree
    print_config: bool
    help: bool
    dry_run: bool


def parse_arguments(argv: list[str]) -> Arguments:
    """Parse `--config FILE`, `--print-config`, `--dry-run`, `--help`, and overrides: `--table.key value` or `=value`.

    A value is a TOML scalar or array; text for a string key needs no quotes; a boolean key alone means true.
    In a table that may come several times, the place comes before the key: --data.stages.0.from_step is the first's.
    Raises UserError for anything else.
    """
    config, overrides, flags = None, {}, set()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, given, value = word.removeprefix("--").partition("=")
        if word in ("--help", "-h", "--print-config", "--dry-run"):
            flags.add(word)
        elif word.startswith("--") and (name in ("config", "job.config_file")):
            config = value if given else _next(rest, word)
        elif word.startswith("--") and "." in name:
            annotation = _annotation(name)
            if not given:
                alone = annotation in (bool, Any) and (not rest or rest[0].startswith("--"))
                value = "true" if alone else _next(rest, word)
            overrides[name] = _parse(value, annotation)
        else:
            hint = hint_at(name) or nearest(name, ["config", "print-config", "dry-run", "help"])
            hint = hint if word.startswith("-") else ""
            raise UserError(f"{COMMAND_LINE}: {shorten(word)!r}: expected --config FILE or --table.key value{hint}")
    return Arguments(config, overrides, "--print-config" in flags, bool(flags & {"--help", "-h"}), "--dry-run" in flags)


def _next(rest: list[str], word: str) -> str:
    if not rest or rest[0].startswith("--"):
        raise UserError(f"{COMMAND_LINE}: {shorten(word)} needs a value after it")
    return rest.pop(0)


def _annotation(dotted: str) -> Any:
    if is_torchtitan_key(dotted):
        return Any
    if not is_key(without_places(dotted)):
        raise UserError(f"{COMMAND_LINE}: --{shorten(dotted)}: {unknown_key(without_places(dotted))}")
    given, _, key = dotted.rpartition(".")
    table = without_places(given)
    placed = given.removeprefix(f"{table}.").isdecimal() and given != table
    if is_repeated(table) and not placed:
        raise UserError(
            f"{COMMAND_LINE}: --{dotted}: there may be several [[{table}]]; say which, --{table}.0.{key} for the first"
        )
    if placed and not is_repeated(table):
        raise UserError(f"{COMMAND_LINE}: --{dotted}: there is one [{table}]; use --{table}.{key}")
    return known_tables()[table].model_fields[key].annotation


def _parse(raw: str, annotation: Any) -> Any:
    """A TOML value; where the key is a string, or the text is not TOML, the text itself."""
    try:
        parsed = parse_toml(f"value = {raw}")
    except ValueError:
        return raw
    if len(parsed) > 1:  # a line break, and another key
        return raw
    value = parsed["value"]
    return raw if _takes_string(annotation) and not isinstance(value, str) else value


def _takes_string(annotation: Any) -> bool:
    """Whether a key's type is a string, one of some strings, or an optional string; not a list of strings."""
    if get_origin(annotation) is tuple:
        return False
    return annotation is str or any(isinstance(a, str) or _takes_string(a) for a in get_args(annotation))
