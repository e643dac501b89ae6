"""From TOML files and command-line overrides to one checked `Config`."""

import copy
import difflib
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from titanling.config.hints import name_here
from titanling.config.schema import Config
from titanling.config.toml import read_toml
from titanling.config.torchtitan import translate
from titanling.errors import UserError
from titanling.paths import expand, try_expand
from titanling.text import shorten, show

COMMAND_LINE = "command line"
HELP_LISTS = "; remove it (--help lists all keys)"
Tree = dict[str, Any]


class LoadedConfig(NamedTuple):
    """A config and, for error messages, the file (or the command line) that each dotted key came from."""

    config: Config
    origins: dict[str, str]
    path: str
    """The file that was loaded: where a key belongs that no file sets."""
    remarks: list[str] = []
    """What has no effect though a file says it, a line each: for whoever starts something with this config to say."""

    def where(self, dotted: str) -> str:
        """The file (or the command line) that set a key or a table, for error messages."""
        return _origin(self.origins, dotted, self.path)


def load_config(path: str | Path, overrides: Tree | None = None) -> LoadedConfig:
    """Read `path`, the files it `extends` and the dotted `overrides`, and check everything that needs no other file.

    Raises UserError for a missing or malformed file, a cycle of `extends`, an unknown key, a wrong type, a value
    out of range, and a torchtitan feature that titanling lacks.
    """
    if not str(path):
        raise UserError('--config "": must be the name of a file')
    tree, origins = _read(Path(expand(str(path))), (), {})
    _make_way(tree, overrides or {})
    for dotted, value in (overrides or {}).items():
        _set(tree, dotted, value)
        origins[without_places(dotted)] = COMMAND_LINE
    remarks = translate(tree, lambda key: _origin(origins, key, str(path)), known_tables().__contains__)
    try:
        return LoadedConfig(Config.model_validate(tree), origins, str(path), remarks)
    except ValidationError as error:
        raise UserError(_explain(error, origins, str(path))) from None


def dump_toml(config: Config) -> str:
    """The whole config as TOML; loading it gives an equal config. Unset optional keys are left out."""
    tree = config.model_dump(exclude_none=True)
    return tomli_w.dumps(_lists(tree))


@cache
def known_tables() -> dict[str, type[BaseModel]]:
    """Dotted name → class of every table, in the order of the schema. Where a list holds tables of several kinds, the
    kind is the last part of the name: data.prepare.filters.length.
    """
    tables: dict[str, type[BaseModel]] = {}

    def walk(table: type[BaseModel], prefix: str) -> None:
        for name, field in table.model_fields.items():
            inner = next((kind for kind in (field.annotation, *get_args(field.annotation)) if _is_table(kind)), None)
            if inner is not None:
                tables[prefix + name] = inner
                walk(inner, f"{prefix}{name}.")
            tables.update({f"{prefix}{name}.{kind}": table for kind, table in _kinds(field.annotation).items()})

    walk(Config, "")
    return tables


def _kinds(annotation: Any) -> dict[str, type[BaseModel]]:
    """Kind → table, if it is a list of tables of several kinds."""
    if get_origin(annotation) is not tuple:
        return {}
    union = next(iter(get_args(get_args(annotation)[0])), None)  # the list's argument without its discriminator
    tables = [table for table in get_args(union) if _is_table(table)]
    return {get_args(table.model_fields["kind"].annotation)[0]: table for table in tables}


def _is_table(annotation: Any) -> bool:
    """Whether it is a table's class. That of a list of tables is the list's argument."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean X?` for the most similar known name, or an empty string."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def unknown_key(dotted: str) -> str:
    """What is wrong with a dotted key that the schema does not have, and the nearest one that it has."""
    tables = known_tables()
    table, _, key = dotted.rpartition(".")
    if is_key(dotted):
        return f'"{dotted}" in quotes is a name of its own, and unknown; write it without them'
    if table in tables:
        hint = _elsewhere(key, table) or nearest(key, list(tables[table].model_fields)) or HELP_LISTS
        return f"unknown key {shorten(key)} in [{table}]{hint}"
    homes = [name for name, found in tables.items() if not table and key in found.model_fields]
    if homes:
        return f"{key} stands outside of any table; it belongs under [{homes[0]}]"
    hint = f"; did you mean {dotted.lower()}?" if is_key(dotted.lower()) else nearest(table or key, list(tables))
    return f"unknown table [{shorten(table or key)}]{hint or _elsewhere(dotted) or HELP_LISTS}"


def _elsewhere(key: str, table: str = "") -> str:
    """`; here it is X` for a key that stands in another table, is written with dashes, or is another trainer's."""
    plain = key.replace("-", "_").lower()
    for dotted in (plain, f"{table}.{plain}"):
        if is_key(dotted):
            return f"; did you mean {dotted}?"
    last = plain.rpartition(".")[2]
    homes = [name for name, found in known_tables().items() if last in found.model_fields and not is_repeated(name)]
    found = " or ".join(f"{home}.{last}" for home in homes) or name_here(key)
    return f"; here it is {found}" if found else ""


def hint_at(flag: str) -> str:
    """The same for a flag of the command line that has no table."""
    return _elsewhere(flag.lstrip("-"))


def is_repeated(table: str) -> bool:
    """Whether a file may hold several of a table, [[table]]."""
    outer, _, key = table.rpartition(".")
    if is_kind(table):
        return True
    return not _is_table((known_tables()[outer] if outer else Config).model_fields[key].annotation)


def without_places(dotted: str) -> str:
    """A dotted key without the places in lists of tables: data.stages.0.from_step is of data.stages.from_step."""
    return ".".join(part for part in dotted.split(".") if not part.isdecimal())


def is_kind(table: str) -> bool:
    """Whether it is one of several kinds of table in the same list, named by its key `kind`."""
    outer = table.rpartition(".")[0]
    return bool(outer) and outer not in known_tables()


def header(table: str) -> str:
    """How a file begins a table; one of several kinds with the key that tells them apart."""
    if is_kind(table):
        outer, _, kind = table.rpartition(".")
        return f'[[{outer}]] kind = "{kind}"'
    return f"[[{table}]]" if is_repeated(table) else f"[{table}]"


def is_key(dotted: str) -> bool:
    """Whether the schema has this dotted key."""
    table, _, key = dotted.rpartition(".")
    tables = known_tables()
    return table in tables and key in tables[table].model_fields


Read = tuple[Tree, dict[str, str]]
"""A file's tree with those it extends under it, and the file of each dotted key."""


def _read(path: Path, above: tuple[str, ...], known: dict[str, Read]) -> Read:
    """Read a file and those it extends, each once however many name it: `known` holds what has been read."""
    resolved = os.path.realpath(path)
    if resolved in above:
        chain = " → ".join((*above[above.index(resolved) :], resolved))
        raise UserError(f"{above[-1]}: extends goes in a circle ({chain}); remove one of these extends")
    if resolved in known:
        return known[resolved]
    try:
        tree = read_toml(path)
    except FileNotFoundError:
        where = f"extended by {above[-1]}" if above else "check --config"
        raise UserError(f"{shorten(str(path), 400)}: no such config file ({where})") from None
    bases = tree.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) and base for base in bases):
        raise UserError(f"{path}: extends = {show(bases)}: must be a file name or a list of file names")
    merged: Tree = {}
    origins: dict[str, str] = {}
    for base in dict.fromkeys(bases):
        try:
            file = path.parent / try_expand(base)
        except ValueError as error:
            raise UserError(f"{path}: extends = {show(base)}: {error}") from None
        base_tree, base_origins = _read(file, (*above, resolved), known)
        _lay_over(merged, copy.deepcopy(base_tree))
        origins |= base_origins
    _lay_over(merged, tree)
    known[resolved] = merged, origins | {key: str(path) for key in _leaves(tree)}
    return known[resolved]


def _lay_over(base: Tree, tree: Tree) -> None:
    """Merge a file's tree into that of the files before it."""
    _make_way(base, _leaves(tree))
    _merge(base, tree)


def _make_way(base: Tree, later: Iterable[str]) -> None:
    """Drop the one way of giving data where `later`, the keys of a later file or of the command line, has the other."""
    data = base.get("data")
    if not isinstance(data, dict):
        return
    if "data.train" in later:
        data.pop("sources", None)
        data.pop("stages", None)
    if "data.sources" in later:
        data.pop("train", None)
        data.pop("stages", None)  # of other sources
        if isinstance(data.get("prepare"), dict):
            data["prepare"].pop("text", None)  # which would make data.train


def _merge(into: Tree, other: Tree) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _leaves(tree: Tree, prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found.append(prefix + key)
        if isinstance(value, dict):
            found += _leaves(value, f"{prefix}{key}.")
    return found


def _set(tree: Tree, dotted: str, value: Any) -> None:
    *tables, key = dotted.split(".")
    inner: Any = tree
    for depth, table in enumerate(tables):
        if isinstance(inner, list) and table.isdecimal():
            if len(table) > 9 or int(table) >= len(inner):
                name = ".".join(tables[:depth])
                shown = f"{COMMAND_LINE}: --{shorten(dotted)}"
                raise UserError(f"{shown}: there are {len(inner)} [[{name}]], counted from 0")
            inner = inner[int(table)]
        elif isinstance(inner, dict):
            place = depth + 1 < len(tables) and tables[depth + 1].isdecimal()
            inner = inner.setdefault(table, [] if place else {})
    if isinstance(inner, dict):  # else the file has a scalar where a table belongs; the schema will refuse it
        inner[key] = value


def _origin(origins: dict[str, str], dotted: str, default: str) -> str:
    while dotted:
        if dotted in origins:
            return origins[dotted]
        dotted = dotted.rpartition(".")[0]
    return default


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(inner) for key, inner in value.items()}
    return [_lists(inner) for inner in value] if isinstance(value, tuple) else value


def _explain(error: ValidationError, origins: dict[str, str], path: str) -> str:
    details = error.errors(include_url=False)
    # An unknown name is the likeliest root cause of whatever else is wrong: say it first.
    details.sort(key=lambda d: d["type"] != "extra_forbidden")
    by_key: dict[str, list[ErrorDetails]] = {}
    for detail in details:
        by_key.setdefault(_key_of(detail), []).append(detail)
    lines = [_explain_one(dotted, complaints, origins, path) for dotted, complaints in by_key.items()]
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return lines[0] + more


def _key_of(detail: ErrorDetails) -> str:
    names = [part for part in detail["loc"] if isinstance(part, str)]
    # A key of several types has its complaints further down, one for each type.
    starts = (".".join(names[:length]) for length in range(1, len(names)))
    outer = {*known_tables(), *(table.rpartition(".")[0] for table in known_tables())}
    return next((start for start in starts if is_key(start) and start not in outer), ".".join(names))


def _explain_one(dotted: str, complaints: list[ErrorDetails], origins: dict[str, str], path: str) -> str:
    # A list whose only item is refused is not empty.
    complaints = [each for each in complaints if each["type"] != "too_short"] or complaints
    detail = complaints[0]
    kind, context = detail["type"], detail.get("ctx", {})
    where = _origin(origins, dotted, path)
    if kind == "extra_forbidden":
        return f"{where}: {unknown_key(dotted)}"
    if kind == "value_error":
        # A check between keys: its message begins with the key at fault.
        culprit = f"{dotted}.{str(context['error']).split()[0]}"
        return f"{_origin(origins, culprit, path)}: {dotted}.{context['error']}"
    if kind == "missing":
        table, _, key = dotted.rpartition(".")
        return f"{where}: a {header(table)} has no {key}, which it needs"
    if kind.startswith("union_tag"):
        return f"{where}: {_explain_kind(dotted, context)}"
    if kind in ("model_type", "model_attributes_type"):
        how = f"[{dotted}]" if dotted in known_tables() else f"[[{dotted}]]"
        return f"{where}: {dotted} = {show(detail['input'])}: must be a table, {how}"
    wanted = list(dict.fromkeys(_requirement(each["type"], each.get("ctx", {}), each["msg"]) for each in complaints))
    requirement = ", or ".join([wanted[0], *(text.removeprefix("must be ") for text in wanted[1:])])
    return f"{where}: {dotted} = {show(detail['input'])}: {requirement}"


def _explain_kind(dotted: str, context: dict[str, Any]) -> str:
    kinds = [table.rpartition(".")[2] for table in known_tables() if table.rpartition(".")[0] == dotted]
    if "tag" not in context:
        return f"a [[{dotted}]] has no kind, which it needs: one of {', '.join(kinds)}"
    hint = nearest(context["tag"], kinds) or f"; there are {', '.join(kinds)}"
    return f"{dotted} has the unknown kind {show(context['tag'])}{hint}"


def _requirement(kind: str, context: dict[str, Any], message: str) -> str:
    types = {
        "int_type": "an integer",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "a string in quotes",
        "tuple_type": "a list",
        "finite_number": "a finite number",
    }
    limits = {"greater_than_equal": ("ge", "at least"), "greater_than": ("gt", "greater than")}
    limits |= {"less_than_equal": ("le", "at most"), "less_than": ("lt", "less than")}
    if kind in types:
        return f"must be {types[kind]}"
    if kind in limits:
        name, words = limits[kind]
        return f"must be {words} {context[name]}"
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind in ("string_too_short", "too_short"):
        return "must not be empty"
    return message[:1].lower() + message[1:]
