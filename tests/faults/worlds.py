"""The number of processes and the layout change between parts of a run; and a rank whose gradient is nan."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harm import Job, Row, state
from helpers import ROOT, TinyData
from runs import differing, rows, saved_shards

from titanling.checkpoint import folder

PLANS = ROOT / "tests" / "faults" / "plans.py"
LOSS_LIMIT = 2e-6
VOCAB = 323  # odd, so that no number of ranks divides it


class Part(NamedTuple):
    """Two steps of a run under one layout."""

    name: str
    ranks: int
    options: tuple[str, ...] = ()


def _degrees(replicate: int = 1, shard: int = 1, tensor: int = 1, pipeline: int = 1) -> tuple[str, ...]:
    names = ("data_parallel_replicate", "data_parallel_shard", "tensor_parallel", "pipeline_parallel")
    degrees = zip(names, (replicate, shard, tensor, pipeline), strict=True)
    return tuple(f"--parallelism.{name}_degree={degree}" for name, degree in degrees)


CHAIN = (
    Part("fsdp 4", 4, _degrees(shard=4)),
    Part("tp 2", 2, _degrees(tensor=2)),
    Part("1", 1),
    Part("hsdp 2 × 2", 4, _degrees(replicate=2, shard=2)),
    Part("pp 2 × fsdp 2", 4, _degrees(shard=2, pipeline=2)),
    Part("tp 2 × fsdp 2", 4, _degrees(shard=2, tensor=2)),
)
SHAPE = {
    "model.dim": 32,
    "model.ffn_dim": 64,
    "model.vocab_size": VOCAB,
    "model.n_layers": 4,
    "model.dropout": 0.0,
    "training.local_batch_size": 2,
    "training.global_batch_size": 8,
    "training.seq_len": 32,
}


def change_worlds(where: Path, data: TinyData, chain: Sequence[Part] = CHAIN) -> Row:
    """One run, two steps under each layout of `chain`, against one process that does all steps."""
    steps = 2 * len(chain)
    changes = {**SHAPE, "training.steps": steps, "parallelism.plans": [f"{PLANS}:Record"]}
    straight = Job(where / "straight", data, changes)
    with straight.started(RECORD_TO=str(where / "ids-straight")) as process:
        if process.end():
            return Row("world size changed", 0, [process.said[-2000:]], "the straight run failed")
    job, failures, worst = Job(where / "changed", data, changes), [], 0.0
    expected = _sequences(where / "ids-straight")
    for index, part in enumerate(chain):
        job.ranks = part.ranks
        total = 2 * (index + 1)
        ids = where / f"ids-{index}"
        overrides = ("--training.steps", str(total), "--lr_scheduler.total_steps", str(steps), *part.options)
        with job.started(*overrides, RECORD_TO=str(ids)) as process:
            code = process.end()
            if code:
                return Row("world size changed", index, [f"{part.name}: code {code}: {process.said[-2000:]}"], "failed")
        batch = SHAPE["training.global_batch_size"]
        assert isinstance(batch, int)
        wanted = expected[2 * index * batch : total * batch]
        if sorted(set(_sequences(ids))) != sorted(set(wanted)):
            failures.append(f"{part.name}: other samples")
    for (step, loss), (_, other) in zip(rows(job.run), rows(straight.run), strict=True):
        worst = max(worst, abs(loss - other))
        if abs(loss - other) > LOSS_LIMIT:
            failures.append(f"step {step} ({chain[(step - 1) // 2].name}): loss off by {abs(loss - other):.1e}")
    names = " → ".join(part.name for part in chain)
    what = f"{names}; vocabulary {VOCAB}: same samples, losses within {worst:.1e}"
    return Row("world size and layout changed on resume", len(chain), failures, what, {"worst_loss": worst})


def poison_a_gradient(where: Path, data: TinyData, clean_steps: int) -> Row:
    """A nan gradient on rank 1 of two at step 4 of 6; and a clean run, in which nothing may be skipped."""
    changes = {
        **SHAPE,
        "training.steps": 6,
        "training.global_batch_size": 4,
        "checkpoint.interval": 1,
        "checkpoint.keep_latest_k": 0,
        # A save waits for a step that updates, but not at the last step before the decay.
        "lr_scheduler.decay_ratio": 1 / 3,
        "parallelism.plans": [f"{PLANS}:Poison"],
    }
    job, failures = Job(where / "poisoned", data, changes, ranks=2), []
    with job.started(POISON_AT="4") as process:
        if process.end():
            failures.append(process.said[-2000:])
    if not failures:
        at = [saved_shards(folder.step_folder(job.root, step)) for step in (3, 4, 5)]
        failures += [f"{name} changed in the skipped step" for name in differing(at[0], at[1])]
        failures += [] if differing(at[1], at[2]) else ["the step behind did not train"]
        skipped = [state(job, step)["skipped_steps"] for step in (3, 4, 6)]
        failures += [] if skipped == [0, 1, 1] else [f"skipped steps {skipped}"]
    longer = {"training.steps": clean_steps, "checkpoint.interval": 10**6}
    clean = Job(where / "clean", data, changes | longer, ranks=2)
    with clean.started(POISON_AT="0") as process:
        if process.end(300):
            failures.append(process.said[-2000:])
    false = rows(clean.run, "skipped_steps")[-1][1]
    failures += [f"{false:.0f} false skips"] if false else []
    what = f"parameters and Adam's state bit-equal, counted once; {false:.0f} false skips in {clean_steps} steps"
    return Row("NaN gradient on one rank of 2", 1, failures, what, {"false_skips": false})


def _sequences(record: Path) -> list[str]:
    return [json.loads(line) for path in sorted(record.iterdir()) for line in path.read_text().splitlines()]
