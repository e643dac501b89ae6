"""May this run go on from that checkpoint? Imports no torch."""

from pathlib import Path
from typing import Any

from titanling.errors import UserError
from titanling.text import one_line

# Where a run writes and what it prints may differ between its parts without a word.
UNREMARKABLE = ("job.", "metrics.", "profiling.", "comm.", "data.prepare.", "sampling.")


def check_resumable(
    path: Path, state: dict[str, Any], shape: dict[str, Any], data: dict[str, Any], config: dict[str, Any]
) -> list[str]:
    """In words, which settings changed since `state`, that of the checkpoint `path`.

    Raises UserError if the checkpoint holds another model or was trained on other data, saying what differs.
    """
    check_model(path, state["model"], shape, "restore these, or use another job.dump_folder")
    if "stages" not in state["data"]:
        raise UserError(f"{path}: was saved before runs had sources; convert its weights, or use that version to go on")
    _check_stream(path, state["data"].get("stream"), data.get("stream"))
    # Concat: as it was before there was a choice, and as streams are.
    both = ({"packing": "concat"} | each for each in (state["data"], data))
    before, now = (_read_so_far(each, state["tokens_seen"]) for each in both)
    if "eod_id" not in before:  # a state from before streams said so
        now.pop("eod_id", None)
    if before["stages"] != now["stages"]:
        raise UserError(
            f"{path}: data.stages: up to step {state['step']:,} it read {_stages(before)}, and this config says"
            f" {_stages(now)}; restore these (with the same training.global_batch_size): only what begins after that"
            " step may change"
        )
    files = [before.pop("files", {}), now.pop("files", {})]
    differ = {_file_words(key): pair for key, pair in _differences(before, now).items()}
    if differ:
        raise UserError(
            f"{path}: was trained on other data than this config: {_words(differ)}; restore these, or use another"
            " job.dump_folder"
        )
    _check_files(path, *files)
    changed = {
        key: pair
        for key, pair in _differences(state["config"], config).items()
        if not key.startswith(UNREMARKABLE) and not key.startswith("model.")
    }
    return [one_line(f"{key} was {old}, now {new}") for key, (old, new) in changed.items()]


def _check_stream(path: Path, before: dict[str, Any] | None, now: dict[str, Any] | None) -> None:
    """Each worker of each rank has read documents of its own up to a place of its own: nobody else can go on there."""
    if before is not None and now is not None and before != now:
        differ = _differences(before, now)
        raise UserError(
            f"{path}: its sources were streamed with other settings: {_words(differ)}; restore these (token files,"
            " which scripts/prepare_data.py makes, go on with any)"
        )


def _check_files(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare the content of token files, wherever they are now; checkpoints of earlier versions say nothing of it."""
    for name in sorted(before.keys() & now.keys()):
        for old, new in zip(before[name], now[name], strict=False):
            for key, suffix in (("tokens", ""), ("sample", ""), ("index", "'s index")):
                if old.get(key) != new.get(key):
                    raise UserError(
                        f"{new['path']}{suffix}: holds something else than what {path} was trained on (source"
                        f' "{name}": {key} {_short(old.get(key))}, now {_short(new.get(key))}); restore it, or use'
                        " another job.dump_folder"
                    )


def _read_so_far(data: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Without the stages that have not begun after so many tokens, and without the sources that only they read."""
    stages = [stage for stage in data["stages"] if stage["start"] * data["seq_len"] < max(1, tokens)]
    names = {name for stage in stages for name in stage["weights"]}
    tables = {key: data[key] for key in ("sources", "files") if key in data}
    kept = {key: {name: each for name, each in table.items() if name in names} for key, table in tables.items()}
    return data | {"stages": stages} | kept


def _file_words(key: str) -> str:
    """sources.NAME.bin_sha256 in words, for who has never seen that hash."""
    table, _, rest = key.partition(".")
    name, _, file = rest.rpartition(".")
    known = table == "sources" and name and file in ("bin_sha256", "idx_sha256")
    return f'the .{file.removesuffix("_sha256")} of source "{name}"' if known else key


def _stages(data: dict[str, Any]) -> str:
    return ", ".join(
        " : ".join(f"{name} {weight}" for name, weight in stage["weights"].items())
        + (f" in rows of {stage['seq_len']:,}" if "seq_len" in stage else "")
        + f" from token {stage['start'] * data['seq_len']:,}"
        for stage in data["stages"]
    )


def check_model(path: Path, theirs: dict[str, Any], ours: dict[str, Any], remedy: str) -> None:
    """Raise UserError if `path` holds a model of another shape than ours, saying what differs."""
    differ = _differences(theirs, ours)
    if differ:
        raise UserError(f"{path}: holds another model than this config: {_words(differ)}; {remedy}")


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found |= _differences(before, now, f"{prefix}{key}.")
        elif before != (list(now) if isinstance(now, tuple) else now):
            found[prefix + key] = (before, now)
    return found


def _words(differences: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} was {_short(old)} and is now {_short(new)}" for key, (old, new) in differences.items())


def _short(value: Any) -> str:
    text = one_line(str(value))
    return text if len(text) <= 20 else text[:12] + "…"
