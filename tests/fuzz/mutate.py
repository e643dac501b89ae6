"""Odd files: what chance, a bug or an attacker makes of good ones. Everything follows from the random generator."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import tomli_w

from titanling.checkpoint import folder as checkpoints

# What JSON's and TOML's writers cannot or should not write: put in their place afterwards.
RAW = {
    "@big@": "9" * 5000,
    "@large@": "1" + "0" * 40,
    "@deep@": "[" * 20_000 + "]" * 20_000,
    "@nested@": '{"a":' * 400 + "1" + "}" * 400,
    "@float@": "1e999",
    "@nan@": "NaN",
    "@surrogate@": '"\\ud800"',
    "@nul@": '"a\\u0000b"',
    "@escape@": '"\\u001b[31mred\\u009b"',
}
TOML_RAW = RAW | {"@deep@": "[" * 400 + "]" * 400, "@nested@": "{a=" * 400 + "1" + "}" * 400, "@nan@": "nan"}
TOML_RAW |= {"@surrogate@": '"\\ud800"', "@float@": "inf", "@escape@": '"\\u001b[31mred\\u009b"'}
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 2**64, -(2**63), 0.0, -0.0, 0.5, -1.5, 1e308, 1e-320),
    *("", " ", "a", "true", "1", "-1", "../outside.txt", "/nowhere/at/all", "~", "$HOME", ".", "..", "/", "x" * 5000),
    *(
        "\u202e",
        "ä\n\r\tß",
        "a/b",
        "a\\b",
        "%s %d",
        "{}",
        "[",
        "s3://bucket/x",
        "step-000002",
        "float32",
        "F32",
        "BOOL",
    ),
    *([], {}, [[]], [None], [1, 2, 3], {"": {}}, {"a": None}, {"step": "x"}, [0, 0], [0, 2**62], ["a", 1, None]),
    *RAW,
]


def change(value: Any, random: Random, times: int = 1) -> Any:
    """A copy of JSON values with odd ones in some places."""
    value = json.loads(json.dumps(value))
    for _ in range(times):
        place = _place(value, random)
        if place is None:
            return random.choice(ODD)
        holder, key = place
        action = random.randrange(6)
        if action == 0 and isinstance(holder, dict):
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[random.choice(("", "a", str(key) + "x", str(key).upper(), "../outside.txt", "a\x1b[1mb"))] = holder[
                key
            ]
        elif action == 2:
            other, there = _place(value, random)
            holder[key] = json.loads(json.dumps(other[there]))
        elif action == 3 and isinstance(holder, list):
            holder[key : key + 1] = [holder[key]] * random.choice((0, 2, 5))
        else:
            holder[key] = random.choice(ODD)
    return value


def _place(value: Any, random: Random) -> tuple[Any, Any] | None:
    """Some list or table inside, and one of its places; those near the top are chosen more often."""
    if not isinstance(value, (dict, list)) or not value:
        return None
    key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
    inner = _place(value[key], random) if random.random() < 0.6 else None
    return inner or (value, key)


def json_text(value: Any, indent: int | None = 1) -> str:
    """JSON with what its writer cannot write."""
    return _raw(json.dumps(value, indent=indent), RAW)


def toml_text(tree: dict[str, Any]) -> str:
    """TOML with what its writer cannot write; what TOML lacks, null, is left out."""
    try:
        return _raw(tomli_w.dumps(_without_nulls(tree)), TOML_RAW)
    except (TypeError, ValueError, AttributeError, RecursionError):
        return json.dumps(tree)  # no TOML at all


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value if inner is not None] if isinstance(value, list) else value


def _raw(text: str, raw: dict[str, str]) -> str:
    for name, content in raw.items():
        text = text.replace(f'"{name}"', content)
    return text


def change_bytes(content: bytes, random: Random) -> bytes:
    """Bits flipped, cut, doubled, zeros, other numbers, other bytes."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(len(data) + 1)
        end = min(len(data), at + random.choice((1, 4, 8, 100)))
        action = random.randrange(7)
        if action == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif action == 1:
            del data[at:]
        elif action == 2:
            data[at:at] = data[at:end]
        elif action == 3:
            data[at:end] = bytes(end - at)
        elif action == 4:
            data[at:end] = random.randbytes(end - at)
        elif action == 5:
            data[at : at + 8] = struct.pack("<q", random.choice((-1, 0, 1, 2**31, 2**62, -(2**63), 10**6)))
        else:
            data[at:at] = random.choice(
                (b"\0", b"\n", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"{", b"[", b"\x1b[2J", b"\r")
            )
    return bytes(data)


def change_json_file(path: Path, random: Random) -> None:
    """Another value in a JSON file, or other bytes."""
    if random.random() < 0.8:
        value = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json_text(change(value, random, random.choice((1, 1, 2, 4)))), encoding="utf-8")
    else:
        path.write_bytes(change_bytes(path.read_bytes(), random))


def change_lines(path: Path, random: Random) -> None:
    """Another value in some line of JSON lines, or other bytes."""
    lines = path.read_bytes().splitlines()
    if random.random() < 0.3 or not lines:
        path.write_bytes(change_bytes(path.read_bytes(), random))
        return
    at = random.randrange(len(lines))
    lines[at] = json_text(change(json.loads(lines[at]), random), None).encode()
    path.write_bytes(b"\n".join(lines) + random.choice((b"\n", b"", b"\n\n")))


def change_safetensors(path: Path, random: Random) -> None:
    """Another header, or other bytes."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    if random.random() < 0.2:
        path.write_bytes(change_bytes(content, random))
        return
    header = json.loads(content[8 : 8 + length])
    inner = "DCP_SHARDING_INFO"
    metadata = header.get("__metadata__", {})
    if inner in metadata and random.random() < 0.3:
        metadata[inner] = json_text(change(json.loads(metadata[inner]), random), None)
    else:
        header = change(header, random, random.choice((1, 1, 2)))
    text = json_text(header, None).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def reseal(checkpoint: Path) -> None:
    """Make the hashes of a checkpoint right again, so that its reader meets what is inside."""
    files = {name: checkpoints.digest(checkpoint / name) for name in checkpoints.files_of(checkpoint)}
    seal = checkpoints._manifest(files)
    (checkpoint / checkpoints.MANIFEST).write_bytes(checkpoints.encode_json(seal))


def change_kind(path: Path, random: Random) -> None:
    """Something else in a file's place: nothing, a folder, a link, a pipe."""
    path.unlink()
    action = random.randrange(6)
    if action == 1:
        path.mkdir()
    elif action == 2:
        path.symlink_to("../outside.txt")
    elif action == 3:
        path.symlink_to(path.name)
    elif action == 4:
        os.mkfifo(path)
    elif action == 5:
        path.write_bytes(b"")


Change = Callable[[Path, Random], None]
