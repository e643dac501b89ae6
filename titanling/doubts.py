"""What in a config can hardly be meant, with numbers: said when a run starts, which then goes on. Imports no torch."""

from collections.abc import Iterator, Mapping
from typing import Any

from titanling.config import Config
from titanling.config.schema import LRScheduler
from titanling.schedule import decay_steps, lr_factor, trunk_end

JUMP = 0.1
"""Share by which the learning rate may change where a run goes on."""


def doubts(config: Config) -> Iterator[str]:
    """A line for each."""
    yield from schedule_doubts(config.lr_scheduler, config.training.steps, config.optimizer.lr)
    yield from _without_effect(config)


def schedule_doubts(settings: LRScheduler, steps: int, peak: float) -> Iterator[str]:
    """Of a schedule over a run of `steps` steps."""
    total, warmup = settings.total_steps or steps, settings.warmup_steps
    decay = decay_steps(settings, steps)

    def lr(step: int) -> str:
        return f"{peak * lr_factor(settings, steps, step - 1):.2e}"

    if warmup >= steps:
        yield (
            f"lr_scheduler.warmup_steps = {warmup} of a run of training.steps = {steps}: the learning rate only rises,"
            f" to {lr(steps)} of optimizer.lr = {peak:.2e}"
        )
        return
    wanted = round(total * (settings.decay_ratio or 0.0))
    if wanted > max(0, total - warmup):
        yield (
            f"lr_scheduler.decay_ratio = {settings.decay_ratio:g} of {total} steps is {wanted}, but"
            f" behind warmup_steps = {warmup} there are {max(0, total - warmup)}: the decay is shorter"
        )
    if settings.decay_ratio and not decay:
        yield f"lr_scheduler.decay_ratio = {settings.decay_ratio:g} of {total} steps is not one step: nothing decays"
    if not decay and settings.min_lr_factor:
        yield f"lr_scheduler.min_lr_factor = {settings.min_lr_factor:g} has no effect, for nothing decays"
    if decay and settings.min_lr_factor == 1:
        yield "lr_scheduler.min_lr_factor = 1: the decay lowers nothing"
    if settings.total_steps is None or settings.total_steps == steps:
        return
    if not decay:
        yield f"lr_scheduler.total_steps = {total} has no effect, for nothing decays"
    elif total < steps:
        yield (
            f"lr_scheduler.total_steps = {total} is less than training.steps = {steps}: the learning rate is"
            f" {lr(steps)} from step {total + 1} to the end"
        )
    else:
        begins = f"begins after step {total - decay} and " if total - decay < steps else ""
        yield (
            f"lr_scheduler.total_steps = {total} is more than training.steps = {steps}: the decay {begins}"
            f"{'is not over' if begins else 'does not begin'} when the run ends, at {lr(steps)}"
        )


def lr_jump(before: Mapping[str, Any], config: Config, step: int) -> str | None:
    """What to say where a run goes on after `step` with another learning rate than its config of `before` has there."""
    try:
        settings = LRScheduler.model_validate(before["lr_scheduler"])
        steps, peak = int(before["training"]["steps"]), float(before["optimizer"]["lr"])
    except (LookupError, TypeError, ValueError):  # of another version
        return None
    planned = peak * lr_factor(settings, steps, step)
    now = config.optimizer.lr * lr_factor(config.lr_scheduler, config.training.steps, step)
    last = peak * lr_factor(settings, steps, max(0, step - 1))
    if (1 - JUMP) * min(last, planned) <= now <= (1 + JUMP) * max(last, planned):
        return None
    trunk, remedy = trunk_end(settings, steps), ""
    if trunk is not None and trunk < step and now > last:
        remedy = f"; it began to fall behind step {trunk}: a longer run better goes on from there"
    return (
        f"the learning rate goes from {last:.2e} in step {step} to {now:.2e} in step {step + 1}, where the schedule so"
        f" far had {planned:.2e}{remedy}"
    )


def _without_effect(config: Config) -> Iterator[str]:
    steps, checkpoint, validation = config.training.steps, config.checkpoint, config.validation
    given = checkpoint.model_fields_set
    seldom = [
        ("validation.freq", validation.freq, validation.enable, "validates only after the last one"),
        ("sampling.freq", config.sampling.freq, bool(config.sampling.freq), "samples only after the last one"),
        ("profiling.profile_freq", config.profiling.profile_freq, config.profiling.enable_profiling, "has no trace"),
        ("checkpoint.interval", checkpoint.interval, checkpoint.enable and "interval" in given, "saves only the last"),
        ("checkpoint.keep_every", checkpoint.keep_every, checkpoint.enable, "keeps none of its checkpoints for it"),
    ]
    for key, every, asked, what in seldom:
        if asked and every > steps:
            yield f"{key} = {every} is more than training.steps = {steps}: the run {what}"
    if checkpoint.keep_best and not validation.enable:
        yield "checkpoint.keep_best = true has no effect, for nothing is validated: set validation.enable = true"
    for stage in config.data.stages:
        if stage.from_step is not None and stage.from_step >= steps:
            yield f"data.stages: the one from_step = {stage.from_step} never begins, for training.steps = {steps}"
