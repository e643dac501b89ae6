"""Tells what preparations and runs have written from the text that they read, wherever the two lie."""

import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from titanling.files import is_temporary

_TOKENIZER = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|tokenizer\.model"
    r"|chat_template\.(jinja|json)"
)
_RUN = re.compile(r"(config(\.\d+)?\.toml|metrics(\.\d+)?\.jsonl|owner\.json)(\..*)?")
_OF_PREFIX = r"(-shard-\d{5}-of-\d{5})?\.(bin|idx|json|report\.json|ids\.jsonl|empty|parts)(\..*)?"
_PARTIAL = re.compile(r"(.+)\.((bin|idx|json)\.partial|parts)(\..*)?")
_STEP = re.compile(r"step-\d{6,}(\..+)?")


class Outputs:
    """What a preparation makes, and the run folder that it is for: none of it is text.

    Attributes: `met`, the paths that were left out.
    """

    def __init__(
        self, prefixes: Sequence[str] = (), tokenizer: str | None = None, run_folder: str | None = None
    ) -> None:
        """Of these prefixes of token files, the tokenizer's directory, and `job.dump_folder`."""
        self.met: list[str] = []
        self._prefixes, self._tokenizer, self._run_folder = prefixes, tokenizer, run_folder

    @cached_property
    def _own(self) -> list[tuple[str, re.Pattern[str]]]:
        """(folder, names in it)."""
        own = [
            (_real(os.path.dirname(prefix) or "."), re.compile(re.escape(os.path.basename(prefix)) + _OF_PREFIX))
            for prefix in self._prefixes
        ]
        if self._tokenizer is not None:
            above, name = os.path.split(os.path.abspath(self._tokenizer))
            own += [(_real(self._tokenizer), _TOKENIZER), (_real(above), re.compile(re.escape(name) + r"\.partial.*"))]
        if self._run_folder is not None:
            own.append((_real(self._run_folder), _RUN))
        return own

    def has(self, path: str) -> bool:
        """Whether a file, or what a link leads to, is one of them, or lies in a folder that is. Remembers it."""
        if not self._own:
            return False
        linked = os.path.join(_real(os.path.dirname(path) or "."), os.path.basename(path))
        for each in {linked, os.path.realpath(linked)}:
            if any(map(is_temporary, each.split(os.sep))):
                self.met.append(path)
                return True
            for folder, names in self._own:
                inside = (
                    each[len(folder) :].lstrip(os.sep).split(os.sep) if f"{each}/".startswith(f"{folder}/") else [""]
                )
                if names.fullmatch(inside[0]):
                    self.met.append(path)
                    return True
        return False

    def among(self, folder: str, names: Iterable[str]) -> set[str]:
        """Which files and folders of a folder any preparation, tokenizer, run or export has written. Remembers them."""
        names = set(names)
        found = {name for name in names if _STEP.fullmatch(name) and _is_checkpoint(os.path.join(folder, name))}
        found |= set(filter(is_temporary, names))
        if "tokenizer.json" in names:
            found |= {name for name in names if _TOKENIZER.fullmatch(name)}
        if {"config.toml", "metrics.jsonl"} <= names:
            found |= {name for name in names if _RUN.fullmatch(name) or name == "tensorboard"}
        if "config.json" in names and any(name.endswith(".safetensors") for name in names):
            # A model: its card and its licence are no text either.
            found |= {name for name in names if not os.path.isdir(os.path.join(folder, name))}
        prefixes = {name[:-4] for name in names if name.endswith(".idx") and _is_index(os.path.join(folder, name))}
        prefixes |= {match[1] for name in names if (match := _PARTIAL.fullmatch(name))}
        for prefix in prefixes:
            pattern = re.compile(re.escape(prefix) + _OF_PREFIX)
            found |= {name for name in names if pattern.fullmatch(name)}
        self.met += [os.path.join(folder, name) for name in sorted(found)]
        return found


def _is_index(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(7) == b"MMIDIDX"


def _is_checkpoint(path: str) -> bool:
    return any(Path(path, name).exists() for name in ("manifest.json", "state.json", "model", "optimizer"))


@lru_cache(4096)
def _real(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))
