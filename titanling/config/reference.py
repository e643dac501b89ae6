"""`--help` and docs/configuration.md, made from the schema.

python -m titanling.config.reference > docs/configuration.md
"""

import json
import re
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from titanling.config.load import header, is_kind, is_repeated, known_tables

HELP = """\
usage: python -m titanling.train --config FILE [--table.key value …] [--print-config | --dry-run]

  --config FILE    the run's TOML; it may start with  extends = "other.toml"
  --table.key V    override one key: --training.steps 400, --optimizer.lr=3e-4, --compile.enable
  --print-config   print the resolved TOML and exit
  --dry-run        print memory, collectives and speed to expect, and exit (scripts/plan.py has more options)
  --help           print this and exit

example: python -m titanling.train --config train_configs/debug.toml --training.steps 400
"""


def help_text() -> str:
    """Every key with its type, default and meaning, as plain text."""
    lines = [HELP]
    for table, keys in _tables():
        lines.append(f"{header(table)} {_doc(known_tables()[table])}")
        flag = f"{header(table)} " if is_repeated(table) else f"--{table}."
        lines += [f"  {flag}{key}  {kind}, default {default}\n      {doc}" for key, kind, default, doc in keys]
        lines.append("")
    return "\n".join(lines)


def markdown() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Generated from `titanling/config/schema.py` by `python -m titanling.config.reference > docs/configuration.md`;"
        " the tests check that it is current.",
        "",
        'A run is one TOML file. `extends = "base.toml"` (or a list), at the top, composes files: later ones win, key'
        " by key; their paths are relative to the file that names them. In every path `~`, `$VAR` and `${VAR}` mean"
        " what they mean in a shell, and a variable that is not set is refused. `--table.key value` on the command line"
        " wins over all. Unknown keys, wrong types and values out of range are refused. Tables and keys are torchtitan"
        " v0.2.2's wherever the meaning is the same; keys marked *not yet* are understood but accept only their default"
        " so far.",
    ]
    for table, keys in _tables():
        lines += ["", f"## {header(table)}", "", _doc(known_tables()[table]), "", "| key | type | default | meaning |"]
        lines.append("|---|---|---|---|")
        for key, kind, default, doc in keys:
            cells = (f"`{key}`", kind, default if default in ("unset", "required") else f"`{default}`", doc)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _tables() -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    found = []
    for name, table in known_tables().items():
        keys = [
            (key, _kind(f"{name}.{key}", field), _default(field), _description(field))
            for key, field in table.model_fields.items()
            if f"{name}.{key}" not in known_tables() and not (key == "kind" and is_kind(name))
        ]
        if keys:
            found.append((name, keys))
    return found


def _doc(table: type) -> str:
    return (table.__doc__ or "").strip()


def _description(field: FieldInfo) -> str:
    text = re.sub(r"\s+", " ", field.description or "")
    not_yet = isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("not_yet")
    return f"{text} *Not yet.*" if not_yet else text


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "required"
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)


def _kind(dotted: str, field: FieldInfo) -> str:
    if any(table.startswith(f"{dotted}.") for table in known_tables()):
        return "list of tables"
    bounds = [f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in SIGNS if hasattr(m, name)]
    return " ".join([_type_name(field.annotation), *bounds])


SIGNS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(json.dumps(choice) for choice in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    names = {int: "integer", float: "number", bool: "boolean", str: "string"}
    if annotation in names:
        return names[annotation]
    inner = [a for a in get_args(annotation) if a is not type(None) and a is not Ellipsis]
    if get_origin(annotation) is dict:
        return f"table of names and {_type_name(inner[1])}s"
    if get_origin(annotation) is tuple and Ellipsis not in get_args(annotation):
        return f"[{', '.join(map(_type_name, get_args(annotation)))}]"
    if get_origin(annotation) is tuple:
        return f"list of {_type_name(inner[0])}"
    return " or ".join(_type_name(a) for a in inner)


if __name__ == "__main__":
    print(markdown(), end="")
