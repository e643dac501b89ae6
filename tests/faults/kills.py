"""kill -9, again and again, in the middle of saves."""

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from harm import Job, Row
from helpers import TinyData

from titanling.checkpoint import folder

VICTIMS = ("command", "last rank")


def kill_during_saves(
    where: Path, data: TinyData, ranks: int, mode: str, kills: int, victims: Sequence[str] = VICTIMS, seed: int = 7
) -> Row:
    """Kill one run `kills` times while it saves; then it must end as the one that nobody touched."""
    # What is written in the background is written during the next steps, which are short here.
    choose, interval = random.Random(seed), 2 if mode == "disabled" else 4
    steps = 2 * interval * (kills + 1)
    changes = {"training.steps": steps, "checkpoint.async_mode": mode, "checkpoint.interval": interval}
    straight, job = (Job(where / name, data, changes, ranks) for name in ("straight", "killed"))
    straight.finish()
    failures: list[str] = []
    cut = lost = resumed = 0
    for number in range(kills):
        before = job.saved()
        with job.started() as process:
            # Not before it has tidied up: what the one before left looks like its own.
            process.wait_until(lambda process=process: "\nstep " in process.said, "its first step")
            aim = (before[-1] if before else 0) + choose.randint(1, 4)
            process.wait_until(lambda aim=aim: job.step >= aim, f"step {aim}")
            process.wait_until(lambda: job.saving, "a save")
            # Every other one at once: on a quick disk a save is over before the other kills come.
            time.sleep(choose.uniform(0, 0.02) * (number % 2))
            victim = victims[number % len(victims)] if ranks > 1 else "command"
            os.kill(process.popen.pid if victim == "command" else process.ranks()[-1], signal.SIGKILL)
            code, reached = process.end(30), job.step
            resumed += f"resumed from {folder.step_folder(job.root, before[-1])}" in process.said if before else 1
        cut += job.saving
        expected = -signal.SIGKILL if victim == "command" else 128 + signal.SIGKILL
        if code != expected:
            failures.append(f"kill {number + 1}: code {code} instead of {expected}")
        failures += [f"kill {number + 1}: {torn}" for torn in job.torn()]
        # A save that is under way in the background may still become the newest one or not: at most it is lost.
        lost = max(lost, reached // job.interval * job.interval - max(job.saved(), default=0))
    job.finish()
    if resumed != kills:
        failures.append(f"{resumed} of {kills} starts resumed from the newest checkpoint")
    if lost > job.interval:
        failures.append(f"{lost} steps lost, the interval is {job.interval}")
    failures += [f"differs from the uninterrupted run: {name}" for name in job.unlike(straight, steps)]
    what = f"{resumed}/{kills} resumed, {cut} saves cut short, ≤ {lost} steps lost of an interval of {job.interval}"
    name = f"kill -9 during saves, {ranks} rank{'s' if ranks > 1 else ''}, async_mode {mode}"
    figures = {"resumed": resumed, "cut_short": cut, "steps_lost": lost}
    return Row(name, kills, failures, f"{what}; end bitwise equal", figures)
