"""Damaged and hostile checkpoints, met by the Checkpointer of a live trainer: thousands of loads in one process."""

import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harm import Row
from helpers import TinyData
from runs import Tensors, differing, live_tensors, open_trainer

from titanling.checkpoint import folder
from titanling.errors import UserError
from titanling.trainer import Trainer

CHANGES = {"training.steps": 6, "checkpoint.interval": 2, "checkpoint.keep_latest_k": 3}
NEWEST = 6


class Patient:
    """A finished run with checkpoints of steps 2, 4 and 6, and a trainer that can load any of them."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.root = trainer.checkpointer.root
        self.newest = folder.step_folder(self.root, NEWEST)
        self.sound = self.root.with_name("sound")
        shutil.copytree(self.root, self.sound)
        self.good: dict[int, Tensors] = {}
        for step in (4, NEWEST):
            trainer.checkpointer.settings = trainer.config.checkpoint.model_copy(update={"load_step": step})
            self.restore()
            self.good[step] = live_tensors(trainer)
            self.heal()  # loading an earlier one sets the later ones aside
        trainer.checkpointer.settings = trainer.config.checkpoint

    @property
    def files(self) -> list[Path]:
        """All files of the newest checkpoint, relative to it."""
        return [Path(folder.MANIFEST), *map(Path, folder.files_of(self.newest))]

    def restore(self) -> tuple[int, str]:
        """Load as at a start; the step that was taken, and what was said."""
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
            steps = self.trainer.config.training.steps
            restored = self.trainer.checkpointer.restore(*self.trainer._tensors(), steps, lambda *_: [])
        assert restored is not None
        return restored.state["step"], said.getvalue()

    def heal(self, step: int = NEWEST) -> None:
        """Put one checkpoint back as it was."""
        for path in self.root.glob(f"step-{step:06d}*"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.copytree(folder.step_folder(self.sound, step), folder.step_folder(self.root, step))

    def examine(self, what: str, words: str = "") -> list[str]:
        """Load the damaged newest checkpoint: what goes wrong in noticing it and falling back. Heals it."""
        try:
            step, said = self.restore()
        except BaseException as error:
            self.heal()
            return [f"{what}: {type(error).__name__}: {str(error)[:300]}"]
        found = []
        if step != 4:
            found.append(f"{what}: step {step} was taken")
        if str(self.newest) not in said or "going back to" not in said or len(said.splitlines()) != 1:
            found.append(f"{what}: said {said[:300]!r}")
        if words not in said:
            found.append(f"{what}: did not say {words!r} but {said[:300]!r}")
        self.heal()
        return found


@contextmanager
def patient(where: Path, data: TinyData) -> Iterator[Patient]:
    """Train it."""
    with contextlib.ExitStack() as stack:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = stack.enter_context(open_trainer(where, data, CHANGES))
            trainer.train()
        yield Patient(trainer)


def flip_bits(case: Patient, flips: int, seed: int = 1) -> Row:
    """Half of them at a random place of the whole checkpoint, half in a random file, so that small ones get theirs."""
    choose, failures = random.Random(seed), []
    sizes = [(case.newest / name).stat().st_size for name in case.files]
    for number in range(flips):
        name = choose.choices(case.files, sizes)[0] if number % 2 else choose.choice(case.files)
        path = case.newest / name
        content = bytearray(path.read_bytes())
        at, bit = choose.randrange(len(content)), choose.randrange(8)
        content[at] ^= 1 << bit
        path.write_bytes(content)
        failures += case.examine(f"bit {bit} of byte {at} of {name}")
        if number % 50 == 0:  # what was loaded instead is the checkpoint before, bit by bit
            failures += [f"after {name}: {wrong}" for wrong in differing(live_tensors(case.trainer), case.good[4])]
    detected = flips - len(failures)
    return Row("bit flips", flips, failures, f"{detected} of {flips} detected, the checkpoint before taken")


def cut_and_swap(case: Patient, cuts: int, seed: int = 2) -> Row:
    """Truncated and extended files, missing files and folders, files of another step or run in their place."""
    choose, failures, tries = random.Random(seed), [], 0

    def attempt(what: str, harm: Callable[[], object]) -> None:
        nonlocal tries, failures
        tries += 1
        harm()
        failures += case.examine(what)

    for name in case.files:
        path, size = case.newest / name, (case.newest / name).stat().st_size
        for length in {0, 1, 7, 8, size - 1, *(choose.randrange(size) for _ in range(cuts))}:
            attempt(f"{name} cut to {length}", lambda path=path, length=length: _truncate(path, length))
        attempt(f"{name} longer", lambda path=path: path.write_bytes(path.read_bytes() + b"\0"))
        attempt(f"{name} missing", path.unlink)
        other = folder.step_folder(case.sound, 4) / name
        attempt(f"{name} of step 4", lambda path=path, other=other: shutil.copyfile(other, path))
        attempt(f"{name} is a folder", lambda path=path: (path.unlink(), path.mkdir()))
        twin = case.files[(case.files.index(name) + 1) % len(case.files)]
        attempt(f"{name} is {twin}", lambda path=path, twin=twin: shutil.copyfile(case.newest / twin, path))
    for part in ("model", "optimizer"):
        attempt(f"{part}/ missing", lambda part=part: shutil.rmtree(case.newest / part))
        attempt(f"{part}/ of step 4", lambda part=part: _swap(case, part))
    stranger = case.newest / "model" / "shard-00002-of-00002.safetensors"
    attempt("a file too many", lambda: shutil.copyfile(next((case.newest / "model").iterdir()), stranger))
    attempt("all of step 4", lambda: (shutil.rmtree(case.newest), shutil.copytree(_of(case, 4), case.newest)))
    return Row(
        "truncated, missing, swapped files", tries, failures, f"{tries - len(failures)} of {tries} detected, fallback"
    )


def refuse_whole(case: Patient) -> list[str]:
    """With no good checkpoint left, and with fallback off: one line, and nothing moves."""
    failures = []
    for step in (2, 4, NEWEST):
        path = folder.step_folder(case.root, step) / folder.STATE
        path.write_bytes(path.read_bytes()[:-9])
    try:
        case.restore()
        failures.append("three damaged checkpoints: one was taken")
    except UserError as error:
        if "\n" in str(error) or folder.list_steps(case.root) != [2, 4, NEWEST]:
            failures.append(f"three damaged checkpoints: {error}; left {folder.list_steps(case.root)}")
    for step in (2, 4, NEWEST):
        case.heal(step)
    return failures


def reseal(checkpoint: Path) -> None:
    """Make the manifest agree with whatever the folder holds: what a forger does, for hashes are no signature."""
    files = {name: folder.digest(checkpoint / name) for name in folder.files_of(checkpoint)}
    folder.write_json(checkpoint / folder.MANIFEST, folder._manifest(files))


def rewrite(path: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    """Change a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def _truncate(path: Path, length: int) -> None:
    with path.open("r+b") as file:
        file.truncate(length)


def _of(case: Patient, step: int) -> Path:
    return folder.step_folder(case.sound, step)


def _swap(case: Patient, part: str) -> None:
    shutil.rmtree(case.newest / part)
    shutil.copytree(_of(case, 4) / part, case.newest / part)
