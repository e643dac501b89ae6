"""The token files of a run, cut into windows, and the one sequence of samples that is read from them. Free of torch."""

import errno
import glob
import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import ceil
from typing import Any

import numpy as np

from titanling.config.schema import Data, Source, Stage
from titanling.data.mixture import Mixture, Span, whole_weights
from titanling.data.order import Permutation, order_key
from titanling.data.packing import Arrays, PackedSource, Part, packed_batch
from titanling.data.raw import SUFFIXES
from titanling.data.token_files import Tokens, check_files, contents_of, hashes, open_files, tokens_path
from titanling.errors import UserError

ONLY = "train"
"""Name of the source that is data.train."""
SHARD = re.compile(r"-shard-\d{5}-of-\d{5}$")
"""What the name of a shard has behind that of the merged files: see prepare.run.Shard."""
MUCH = 4
"""Epochs beyond which repeated text teaches clearly less than new text (Muennighoff et al., 2023)."""


def count_windows(dataset: Tokens, seq_len: int) -> int:
    """Windows of `seq_len` tokens in the dataset, each with the one token after it as its last label.

    Raises `UserError` if there is none.
    """
    windows = (dataset.num_tokens - 1) // seq_len
    if windows < 1:
        raise UserError(
            f"{tokens_path(dataset.prefix)}: {dataset.num_tokens} tokens are too few for one sequence of"
            f" seq_len = {seq_len} (which needs {seq_len + 1}); use more text or a smaller training.seq_len"
        )
    return windows


class WindowSource:
    """The endless sample order over one source, of one dataset or several.

    Each dataset's flat token stream is cut into windows of `seq_len` tokens (plus one for the last label), of which
    there are `num_windows` in all; every epoch visits each once, in an order keyed by (seed, name, epoch).
    """

    packing = "concat"

    def __init__(self, datasets: Sequence[Tokens], seq_len: int, seed: int, name: str = ONLY) -> None:
        self.datasets = tuple(datasets)
        self.seq_len = seq_len
        self.seed = seed
        self.name = name
        self._file_ends = list(accumulate(count_windows(dataset, seq_len) for dataset in datasets))
        self.num_windows = self._file_ends[-1]

    def window_of(self, sample: int | np.ndarray) -> int | np.ndarray:
        """Window of a sample of the source (0, 1, …): int for an int, else int64 in the shape of the array."""
        if not isinstance(sample, np.ndarray):
            return self._permutation(sample // self.num_windows).forward(sample % self.num_windows)
        epochs, positions = np.divmod(sample, self.num_windows)
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            windows[chosen] = self._permutation(epoch).forward(positions[chosen])
        return windows

    def samples_of_window(self, window: int | np.ndarray, epoch: int) -> int | np.ndarray:
        """The sample of the source that shows `window` in `epoch` (0, 1, …): the inverse of `window_of`."""
        return epoch * self.num_windows + self._permutation(epoch).inverse(window)

    def batch(self, samples: np.ndarray) -> Arrays:
        """The batch of samples (rows,) of the source, as `whole_batch`."""
        return whole_batch(self.read(samples))

    def read(self, samples: np.ndarray) -> np.ndarray:
        """Tokens of samples (rows,) of the source: (rows, seq_len + 1) in the widest of the files' dtypes."""
        return self.read_windows(self.window_of(samples))

    def read_windows(self, windows: np.ndarray) -> np.ndarray:
        """Tokens of windows (rows,): (rows, seq_len + 1) in the widest of the files' dtypes."""
        if len(self.datasets) == 1:
            return self.datasets[0].read_rows(windows * self.seq_len, self.seq_len + 1)
        files = np.searchsorted(self._file_ends, windows, side="right")
        starts = (windows - np.array([0, *self._file_ends])[files]) * self.seq_len
        tokens = np.empty((len(windows), self.seq_len + 1), np.result_type(*{data.dtype for data in self.datasets}))
        for file in np.unique(files).tolist():
            tokens[files == file] = self.datasets[file].read_rows(starts[files == file], self.seq_len + 1)
        return tokens

    def parts(self, window: int) -> list[Part]:
        """The one part of a dataset that a window is."""
        file = bisect_right(self._file_ends, window)
        before = self._file_ends[file - 1] if file else 0
        return [Part(self.datasets[file], (window - before) * self.seq_len, self.seq_len)]

    def windows_of(self, dataset: int, first: int, last: int) -> range:
        """The windows in which tokens `first` … `last` of a dataset are inputs."""
        before = self._file_ends[dataset - 1] if dataset else 0
        end = self._file_ends[dataset] - before
        return range(before + min(first // self.seq_len, end), before + min(last // self.seq_len + 1, end))

    def _permutation(self, epoch: int) -> Permutation:
        return _order(self.num_windows, self.seed, self.name, epoch)


@lru_cache(256)  # of some epochs of each source
def _order(windows: int, seed: int, name: str, epoch: int) -> Permutation:
    return Permutation(windows, order_key(seed, name, epoch))


class MixedSource:
    """The samples of a run: sample i is a pure function of (the files, seq_len, seed, the stages, i)."""

    def __init__(self, sources: Sequence[WindowSource] | Sequence[PackedSource], mixture: Mixture) -> None:
        """`sources` in the order of the mixture, all of the same kind and seq_len."""
        self.sources = tuple(sources)
        self.mixture = mixture
        self.seq_len = sources[0].seq_len
        self.dtype = np.result_type(*{dataset.dtype for source in sources for dataset in source.datasets})

    def batch(self, samples: np.ndarray) -> Arrays:
        """The batch of samples (rows,) of the run, as `whole_batch`, or `packed_batch` if its sources are packed."""
        if len(self.sources) == 1:  # its samples are the run's
            return self.sources[0].batch(samples)
        sources, numbers = self.mixture.locate(samples)
        # One by one: few rows are of the same source, and for few numpy is slower.
        found = [self.sources[source] for source in sources.tolist()]
        places = [(source, source.window_of(number)) for source, number in zip(found, numbers.tolist(), strict=True)]
        if isinstance(found[0], PackedSource):
            return packed_batch(places)
        tokens = np.empty((len(samples), self.seq_len + 1), self.dtype)
        for row, (source, window) in zip(tokens, places, strict=True):
            ((dataset, start, _),) = source.parts(window)
            row[:] = dataset.read(start, self.seq_len + 1)
        return whole_batch(tokens)

    def close(self) -> None:
        """Close all files."""
        for source in self.sources:
            for dataset in source.datasets:
                dataset.close()

    def epochs(self, samples: int) -> list[float]:
        """How often each source is read in the run's first `samples`."""
        counts = self.mixture.counts(samples)
        return [count / source.num_windows for count, source in zip(counts, self.sources, strict=True)]


def whole_batch(tokens: np.ndarray) -> Arrays:
    """{"input_ids", "labels"}: contiguous int64 (rows, seq_len) of tokens (rows, seq_len + 1), labels one ahead."""
    return {
        "input_ids": tokens[:, :-1].astype(np.int64, order="C"),
        "labels": tokens[:, 1:].astype(np.int64, order="C"),
    }


def sources_of(data: Data) -> tuple[Source, ...]:
    """The sources in the order of their names, which is that of the mixture; data.train is one of them all."""
    if data.train is not None:
        return (Source(name=ONLY, paths=(data.train,), weight=1.0),)
    return tuple(sorted(data.sources, key=lambda source: source.name))


def prefixes_of(data: Data, source: Source) -> list[str]:
    """Prefixes of the source's token files, each glob's in alphabetical order. Raises UserError if one has none."""
    if data.train is not None:
        return [data.train]
    found: dict[str, None] = {}
    for path in source.paths:
        pattern = os.path.join(data.root or "", path)
        suffix = "" if pattern.endswith(SUFFIXES) else ".idx"
        if os.path.exists(f"{pattern}{suffix}"):
            found[pattern] = None
            continue
        files = sorted(glob.glob(f"{pattern}{suffix}", recursive=True))
        if not files:
            raise UserError(
                f'data.sources: "{source.name}": {pattern} is no prefix of token files (.bin, .idx, .json), no .ds or'
                " .npy, nor a glob of any; correct its paths or data.root, or make them: prepare_data.py"
            )
        found |= dict.fromkeys(file.removesuffix(suffix) for file in files)
    # Shards that have been merged would be read twice.
    return [prefix for prefix in found if SHARD.sub("", prefix) not in found or not SHARD.search(prefix)]


def all_prefixes(data: Data) -> list[str]:
    """Prefixes of the token files of all sources. Raises UserError as `prefixes_of`."""
    return [prefix for source in sources_of(data) for prefix in prefixes_of(data, source)]


def open_sources(data: Data, seq_len: int, seed: int, sequences: int) -> MixedSource:
    """Open all files of a run; reads none of their tokens.

    `sequences` is how many a step takes, of all ranks together. Raises UserError: files that are missing or damaged,
    or too short for one sequence; stages that begin together or not in order.
    """
    sources = sources_of(data)
    try:
        files = [([open_files(p, data) for p in prefixes_of(data, source)], source.name) for source in sources]
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise UserError(
            "data.sources: more token files than a process may hold open; raise the limit (ulimit -n), or merge them"
            " (scripts/data.py merge)"
        ) from None
    if data.packing == "best_fit":
        settings = data.packing_window, data.document_mask != "none"
        opened = [PackedSource(datasets, seq_len, seed, name, *settings) for datasets, name in files]
    else:
        opened = [WindowSource(datasets, seq_len, seed, name) for datasets, name in files]
    return MixedSource(opened, Mixture(spans_of(data, sources, seq_len, sequences), seed))


def spans_of(data: Data, sources: Sequence[Source], seq_len: int, sequences: int) -> list[Span]:
    """The stages of a run in samples; weights in the order of `sources`.

    Raises UserError if they are not in order, or one's sequences cannot be cut from those of `seq_len`.
    """
    names = [source.name for source in sources]
    first = {source.name: source.weight or 0.0 for source in sources}
    weights, length = {names[0]: 1.0} if len(names) == 1 else first, seq_len
    stages = {0: (weights, length)}
    for stage in data.stages:
        start, last = (stage.from_step or 0) * sequences or ceil((stage.from_tokens or 0) / seq_len), max(stages)
        if start <= last and not start == last == 0 == stage.from_step:
            raise UserError(
                f"data.stages: the one from {_named(stage)} begins with sequence"
                f" {start:,}, not after the one before it, at {last:,} (a step takes {sequences:,} sequences"
                f" of {seq_len:,} tokens); put them in order"
            )
        weights, length = stage.weights or weights, stage.seq_len or length
        if seq_len % length:
            raise UserError(
                f"data.stages: seq_len = {length} of the one from {_named(stage)} does not divide training.seq_len ="
                f" {seq_len}, whose sequences it cuts into rows; set the latter to the longest of all stages"
            )
        stages[start] = weights, length
    return [
        Span(start, whole_weights([weights.get(name, 0.0) for name in names]), None if length == seq_len else length)
        for start, (weights, length) in stages.items()
    ]


def _named(stage: Stage) -> str:
    return f"step {stage.from_step:,}" if stage.from_step is not None else f"token {stage.from_tokens:,}"


def check_sources(data: Data, vocab_size: int, tokenizer_sha256: str | None, seq_len: int) -> str | None:
    """The hash of the tokenizer that the files are of, None if none says.

    Raises UserError for files that are not whole, too short, or of another vocabulary or tokenizer. `tokenizer_sha256`
    is that of the run's tokenizer; without one, all files must be of the same.
    """
    first: tuple[str, str] | None = None
    for source in sources_of(data):
        for prefix in prefixes_of(data, source):
            found = check_files(prefix, data, vocab_size, tokenizer_sha256)
            if data.packing == "concat":  # packed, all files of a source are one stream
                check_length(prefix, found.tokens, "training.seq_len", seq_len)
            if found.tokenizer_sha256 is None:
                continue
            first = first or (prefix, found.tokenizer_sha256)
            if found.tokenizer_sha256 != first[1]:
                raise UserError(
                    f"data.sources: {first[0]} and {prefix} were tokenised by different tokenizers (tokenizer.json"
                    f" {first[1][:12]}… and {found.tokenizer_sha256[:12]}…); prepare them with one"
                )
    return first[1] if first else tokenizer_sha256


def check_length(prefix: str, tokens: int, key: str, seq_len: int) -> None:
    """Raise UserError if token files are too short for one sequence of `key`."""
    if tokens <= seq_len:
        raise UserError(
            f"{key} = {seq_len}: {tokens_path(prefix)} holds only {tokens} tokens, and one sequence needs"
            f" {seq_len + 1}; give more text or a smaller seq_len"
        )


def check_epochs(data: Data, source: MixedSource, steps: int, sequences: int) -> list[str]:
    """What to warn of. Raises UserError if a source would be read more often than its max_epochs in `steps` steps."""
    warnings = []
    for settings, windows, epochs in zip(
        sources_of(data), source.sources, source.epochs(steps * sequences), strict=True
    ):
        name, limit = settings.name, settings.max_epochs
        if limit is not None and epochs > limit:
            place = source.sources.index(windows)
            sample = source.mixture.sample_of(place, int(limit * windows.num_windows))
            assert sample is not None
            raise UserError(
                f'data.sources: "{name}" has {windows.num_windows:,} sequences, and {steps:,} steps read it'
                f" {epochs:.1f} times; its max_epochs = {limit:g} are over in step {sample // sequences + 1:,}: give it"
                " more text or less weight, raise max_epochs, or train for fewer steps"
            )
        if limit is None and epochs > MUCH:
            warnings.append(
                f'"{name}" is read {epochs:.1f} times in {steps:,} steps; text that is repeated more than {MUCH} times'
                " teaches less than new text"
            )
    return warnings


def identity(source: MixedSource) -> dict[str, Any]:
    """What the order of the samples depends on, for a checkpoint to be compared with: all JSON."""
    return {
        "seq_len": source.seq_len,
        "packing": source.sources[0].packing,
        "seed": source.sources[0].seed,
        "sources": {
            windows.name: _hashes([hashes(dataset.prefix) for dataset in windows.datasets])
            for windows in source.sources
        },
        "stages": stages_of(source.mixture, [windows.name for windows in source.sources]),
        "files": {windows.name: contents_of(windows.datasets) for windows in source.sources},
    }


def _hashes(files: list[dict[str, str]]) -> dict[str, str]:
    """One file's own, or of several the hash of theirs."""
    if len(files) == 1:
        return files[0]
    return {key: hashlib.sha256("".join(each[key] for each in files).encode()).hexdigest() for key in files[0]}


def stages_of(mixture: Mixture, names: Sequence[str]) -> list[dict[str, Any]]:
    """The stages for a checkpoint to be compared with; `names` are those of the sources, in the mixture's order."""
    return [
        {"start": span.start, "weights": {name: w for name, w in zip(names, span.weights, strict=True) if w}}
        | ({} if span.seq_len is None else {"seq_len": span.seq_len})
        for span in mixture.spans
    ]


def describe(source: MixedSource, steps: int, sequences: int) -> list[str]:
    """Lines that say what a run reads: share in every stage, tokens and epochs of each source."""
    lines = lengths_of(source.mixture, source.seq_len, sequences)
    if len(source.sources) == 1:
        return lines
    lines.append(f"data: {len(source.sources)} sources{changes_of(source.mixture, sequences)}")
    width = max(len(windows.name) for windows in source.sources)
    for place, (windows, epochs) in enumerate(zip(source.sources, source.epochs(steps * sequences), strict=True)):
        shares = shares_of(source.mixture, place)
        tokens = sum(dataset.num_tokens for dataset in windows.datasets)
        lines.append(f"  {windows.name:<{width}}  {shares}  of {tokens:,} tokens, {read_words(epochs)}")
    return lines


def read_words(epochs: float) -> str:
    """How often a run reads a source, with two digits that are not 0."""
    if not epochs:
        return "not read"
    return f"read {epochs:.2f} times in all" if epochs >= 0.1 else f"read {epochs:.2g} times in all"


def lengths_of(mixture: Mixture, seq_len: int, sequences: int) -> list[str]:
    """A line that says from when sequences are how long; none if they are all whole."""
    changes, last = [], seq_len
    for span in mixture.spans:
        length = span.seq_len or seq_len
        if length != last:
            changes.append(f"{length:,} tokens from step {_step(span.start, sequences)}")
        last = length
    return [f"data: {seq_len:,} tokens are read together, cut into rows of {', of '.join(changes)}"] if changes else []


def changes_of(mixture: Mixture, sequences: int) -> str:
    """In words, when the shares of sources change; nothing if they never do."""
    pairs = zip(mixture.spans, mixture.spans[1:], strict=False)
    starts = ", ".join(f"step {_step(s.start, sequences)}" for before, s in pairs if s.weights != before.weights)
    return f"; their shares change at {starts}" if starts else ""


def _step(start: int, sequences: int) -> str:
    return f"{start / sequences:,.6g}"


def shares_of(mixture: Mixture, place: int) -> str:
    """In words, the share of a source in every stage."""
    return " → ".join(f"{100 * span.weights[place] / sum(span.weights):5.2f} %" for span in mixture.spans)
