"""Checkpoints, directories and names made to do harm: nothing is executed or written elsewhere; one line says why."""

import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from damage import Patient, reseal, rewrite
from harm import Job, Row
from helpers import TinyData, copy_data, snapshot
from torch import Tensor

from titanling.checkpoint import folder
from titanling.checkpoint.shards import Piece, write_tensors

CONTROL = "\x1b]0;owned\x07\x1b[2J\u202e"
DEEP = b"[" * 200_000
Harm = Callable[[Path], object]


class Payload:
    """Unpickled, it makes a file: the proof that something was executed."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self._proof), "w"))


def meet_hostile_checkpoints(case: Patient) -> Row:
    """Each in the place of the newest checkpoint, resealed where that is possible; the one before must be taken."""
    outside = case.root.parents[1] / "outside"
    outside.mkdir()
    (outside / "victim").write_text("untouched")
    proof = case.root.parents[1] / "executed"
    failures: list[str] = []
    cases = _manifests(outside) | _headers() | _links(outside) | _states() | _pickles(proof)
    before = snapshot(outside)
    for name, harm in cases.items():
        harm(case.newest)
        failures += case.examine(name)
        failures += [f"{name}: executed"] if proof.exists() else []
        failures += [f"{name}: wrote outside"] if snapshot(outside) != before else []
    return Row(
        "hostile manifest, header, links, state, pickles",
        len(cases),
        failures,
        f"{len(cases) - len(failures)} of {len(cases)} refused in one line; nothing executed or written outside",
    )


def meet_hostile_surroundings(where: Path, data: TinyData, fast: bool = False) -> Row:
    """Through the command: control characters in names, pickles as tokenizer and as a model to start from.

    `fast`: only the first and the last.
    """
    proof, failures = where / "executed", []
    bomb = pickle.dumps(Payload(proof))
    named = {"job.dump_folder": str(where / f"run{CONTROL}"), "job.description": f"a{CONTROL}b"}
    tries: list[tuple[str, dict[str, Any], int]] = [("control characters in names", named, 0)]
    named = {"job.dump_folder": str(where / f"run{CONTROL}"), "training.seq_len": 10**6}
    tries.append(("control characters in an error", {**named, "data.train": f"/nowhere{CONTROL}"}, 2))
    poisoned = copy_data(data, where / "data")
    (poisoned.folder / "tokenizer" / "tokenizer.json").write_bytes(bomb)
    tokenizer = {"model.hf_assets_path": poisoned.tokenizer, "sampling.freq": 1}
    tries.append(("a pickle as tokenizer.json", tokenizer, 2))
    start = where / "start"
    for kind in ("manifest.json", "config.json", "model.safetensors", "model.safetensors.index.json"):
        path = start / kind.replace(".", "_")
        path.mkdir(parents=True)
        (path / "config.json").write_text('{"model_type": "llama"}')
        for name in {kind, ".metadata", "pytorch_model.bin", "__0_0.distcp"}:
            (path / name).write_bytes(bomb)
        tries.append((f"a pickle as {kind} of initial_load_path", {"checkpoint.initial_load_path": str(path)}, 2))
    tries = [tries[0], tries[-1]] if fast else tries
    for number, (name, changes, expected) in enumerate(tries):
        job = Job(where / str(number), data, {"training.steps": 1, "checkpoint.enable": True, **changes})
        with job.started() as process:
            code = process.end()
        failures += [f"{name}: {wrong}" for wrong in _wrong(code, expected, process.said)]
        failures += [f"{name}: executed"] if proof.exists() else []
    what = f"{len(tries) - len(failures)} of {len(tries)}: nothing executed, no control character printed, one line"
    return Row("hostile names, tokenizer, initial_load_path", len(tries), failures, what)


def _wrong(code: int, expected: int, said: str) -> list[str]:
    found = [] if code == expected else [f"code {code}: {said[-1500:]}"]
    if re.search("[\x00-\x08\x0b-\x1f\u202e]", said):
        found.append(f"printed control characters: {said[-500:]!r}")
    if "Traceback" in said:
        found.append(said[-1500:])
    errors = [line for line in said.splitlines() if line.startswith("error")]
    return found + ([] if len(errors) == (expected != 0) else [f"said {said[-1500:]}"])


def _manifests(outside: Path) -> dict[str, Harm]:
    """Manifests that are sealed, but lie."""

    def naming(name: str) -> Harm:
        def harm(checkpoint: Path) -> None:
            files = folder.read_manifest(checkpoint)
            files[name] = folder.digest(outside / "victim")
            folder.write_json(checkpoint / folder.MANIFEST, folder._manifest(files))

        return harm

    def entry(**values: object) -> Harm:
        def harm(checkpoint: Path) -> None:
            files = folder.read_manifest(checkpoint)
            files[folder.STATE] = files[folder.STATE] | values
            folder.write_json(checkpoint / folder.MANIFEST, folder._manifest(files))

        return harm

    def raw(content: bytes) -> Harm:
        return lambda checkpoint: (checkpoint / folder.MANIFEST).write_bytes(content)

    return {
        "manifest names ..": naming("../../../outside/victim"),
        "manifest names model/../..": naming("model/../../../../outside/victim"),
        "manifest names an absolute path": naming(str(outside / "victim")),
        "manifest names nothing": naming(""),
        "manifest names itself": naming("manifest.json"),
        "manifest names a folder": naming("model"),
        "manifest names control characters": naming(f"model/{CONTROL}"),
        "manifest names a nul": naming("model/\0x"),
        "manifest with a negative size": entry(bytes=-1),
        "manifest with a huge size": entry(bytes=10**30),
        "manifest with a boolean size": entry(bytes=True),
        "manifest deep": raw(DEEP),
        "manifest a list": raw(b"[]"),
        "manifest empty": raw(b""),
        "manifest not UTF-8": raw(b"\xff\xfe"),
        "manifest without state": lambda c: folder.write_json(
            c / folder.MANIFEST,
            folder._manifest({n: f for n, f in folder.read_manifest(c).items() if n != folder.STATE}),
        ),
        "manifest of format 2": lambda c: rewrite(c / folder.MANIFEST, lambda m: m.update(format=2)),
    }


def _headers() -> dict[str, Harm]:
    """Safetensors headers, in a checkpoint that is resealed around them."""

    def header(change: Callable[[dict[str, Any]], object]) -> Harm:
        def harm(checkpoint: Path) -> None:
            path = next((checkpoint / "model").iterdir())
            content = path.read_bytes()
            (length,) = struct.unpack("<Q", content[:8])
            value = json.loads(content[8 : 8 + length])
            change(value)
            text = json.dumps(value).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
            reseal(checkpoint)

        return harm

    def raw(content: bytes) -> Harm:
        def harm(checkpoint: Path) -> None:
            next((checkpoint / "model").iterdir()).write_bytes(content)
            reseal(checkpoint)

        return harm

    def places(change: Callable[[dict[str, Any]], object]) -> Harm:
        def within(value: dict[str, Any]) -> None:
            sharding = json.loads(value["__metadata__"]["DCP_SHARDING_INFO"])
            change(sharding)
            value["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(sharding)

        return header(within)

    def more(values: Tensor) -> Harm:
        def harm(checkpoint: Path) -> None:
            with (checkpoint / "model" / "shard-00002-of-00002.safetensors").open("wb") as file:
                write_tensors(file, {name: Piece(values, [0] * values.ndim)})
            reseal(checkpoint)

        return harm

    name, other = "model.norm.weight", "lm_head.weight"
    return {
        "a piece twice": more(torch.zeros(32)),
        "a piece of another type": more(torch.zeros(32).half()),
        "a piece of other dimensions": more(torch.zeros(32, 1)),
        "header huge": raw(struct.pack("<Q", 2**62) + b"{}"),
        "header beyond the file": raw(struct.pack("<Q", 10**6) + b"{}"),
        "header deep": raw(struct.pack("<Q", len(DEEP)) + DEEP),
        "header a list": raw(struct.pack("<Q", 2) + b"[]"),
        "header of a text": header(lambda h: h.update({name: "x"})),
        "offsets negative": header(lambda h: h[name].update(data_offsets=[-128, 0])),
        "offsets reversed": header(lambda h: h[name].update(data_offsets=h[name]["data_offsets"][::-1])),
        "offsets beyond the file": header(lambda h: h[name].update(data_offsets=[2**40, 2**40 + 128])),
        "offsets overlapping": header(lambda h: h[name].update(data_offsets=[0, 128])),
        "offsets floating": header(lambda h: h[name].update(data_offsets=[0.5, 128.5])),
        "offsets of texts": header(lambda h: h[name].update(data_offsets=["0", "128"])),
        "shape negative": header(lambda h: h[name].update(shape=[-32])),
        "shape huge": header(lambda h: h[name].update(shape=[2**62, 2**62])),
        "shape floating": header(lambda h: h[name].update(shape=[32.0])),
        "type unknown": header(lambda h: h[name].update(dtype="F8")),
        "type a list": header(lambda h: h[name].update(dtype=["F32"])),
        "tensor missing": header(lambda h: h.pop(other)),
        "place negative": places(lambda p: p[name].update(saved_offsets=[-1])),
        "place beyond": places(lambda p: p[name].update(saved_offsets=[10**15])),
        "place of too many": places(lambda p: p[name].update(saved_offsets=[0, 0])),
        "places a list": header(lambda h: h["__metadata__"].update(DCP_SHARDING_INFO="[]")),
        "places deep": header(lambda h: h["__metadata__"].update(DCP_SHARDING_INFO=DEEP.decode())),
    }


def _links(outside: Path) -> dict[str, Harm]:
    """Files and folders that lead elsewhere, with the right content."""

    def link(name: str) -> Harm:
        def harm(checkpoint: Path) -> None:
            target = outside.parent / "linked" / name.replace("/", "_")
            target.parent.mkdir(exist_ok=True)
            if target.exists():
                shutil.rmtree(target) if target.is_dir() else target.unlink()
            (checkpoint / name).rename(target)
            (checkpoint / name).symlink_to(target)

        return harm

    def loop(checkpoint: Path) -> None:
        shutil.rmtree(checkpoint / "model")
        (checkpoint / "model").symlink_to(checkpoint / "model")

    def unlisted(checkpoint: Path) -> None:
        link("optimizer")(checkpoint)
        files = {name: folder.digest(checkpoint / name) for name in folder.files_of(checkpoint)}
        own = {name: file for name, file in files.items() if not name.startswith("optimizer/")}
        folder.write_json(checkpoint / folder.MANIFEST, folder._manifest(own))

    shard = "model/shard-00001-of-00001.safetensors"
    others: dict[str, Harm] = {
        "model is a link to itself": loop,
        "optimizer is a link that the manifest does not tell of": unlisted,
        "a pipe among the shards": lambda checkpoint: os.mkfifo(checkpoint / "model" / "pipe.safetensors"),
    }
    return others | {f"{name} is a link": link(name) for name in (shard, "state.json", "manifest.json", "model")}


def _states() -> dict[str, Harm]:
    """state.json, resealed."""

    def state(change: Callable[[dict[str, Any]], object]) -> Harm:
        return lambda checkpoint: (rewrite(checkpoint / folder.STATE, change), reseal(checkpoint))

    def raw(content: bytes) -> Harm:
        return lambda checkpoint: ((checkpoint / folder.STATE).write_bytes(content), reseal(checkpoint))

    return {
        "state deep": raw(DEEP),
        "state a list": raw(b"[]"),
        "state empty": raw(b"{}"),
        "state's step a text": state(lambda s: s.update(step="6")),
        "state's step of another": state(lambda s: s.update(step=4)),
        "state's step negative": state(lambda s: s.update(step=-1)),
        "state's tokens_seen a list": state(lambda s: s.update(tokens_seen=[1])),
        "state's model a text": state(lambda s: s.update(model="x")),
        "state's config a list": state(lambda s: s.update(config=[])),
        "state's loader missing": state(lambda s: s.pop("loader")),
        "state's best a text": state(lambda s: s.update(best="x")),
        "state's best without a loss": state(lambda s: s.update(best={"step": 2})),
        "state's best a loss of text": state(lambda s: s.update(best={"step": 2, "val_loss": "x"})),
        "state's tokens_seen huge": state(lambda s: s.update(tokens_seen=10**400)),
        "state's skipped_steps not a number": state(lambda s: s.update(skipped_steps=float("nan"))),
    }


def _pickles(proof: Path) -> dict[str, Harm]:
    """A pickle in every place that is read, and in those where others read one."""
    bomb = pickle.dumps(Payload(proof))

    def plant(name: str, sealed: bool) -> Harm:
        def harm(checkpoint: Path) -> None:
            (checkpoint / name).write_bytes(bomb)
            if sealed and name != folder.MANIFEST:
                reseal(checkpoint)
            for decoy in (".metadata", "model/.metadata", "model/__0_0.distcp", "pytorch_model.bin", "rng.pt"):
                (checkpoint / decoy).write_bytes(bomb)

        return harm

    shards = [f"{part}/shard-00001-of-00001.safetensors" for part in ("model", "optimizer")]
    places = [(name, sealed) for name in (folder.MANIFEST, folder.STATE, *shards) for sealed in (False, True)]
    return {f"a pickle as {name}{', resealed' if sealed else ''}": plant(name, sealed) for name, sealed in places}
