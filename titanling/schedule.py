"""The learning rate as a pure function of the completed steps: nothing to save, nothing to replay on resume."""

import math

from titanling.config.schema import LRScheduler


def lr_factor(settings: LRScheduler, training_steps: int, completed: int) -> float:
    """Fraction of the peak learning rate for the step that follows `completed` finished steps.

    Linear warm-up over `warmup_steps`, constant, then a decay over the last `decay_ratio` of the run, measured from
    its end, that reaches `min_lr_factor` exactly when the run ends (WSD: Hu et al. 2024, MiniCPM). decay_ratio unset
    decays right after the warm-up; 0 never decays.
    """
    if completed < settings.warmup_steps:
        return (completed + 1) / settings.warmup_steps
    decay = decay_steps(settings, training_steps)
    into_decay = completed - ((settings.total_steps or training_steps) - decay)
    if decay == 0 or into_decay <= 0:
        return 1.0
    progress = min(1.0, into_decay / decay)
    shape = {
        "linear": 1 - progress,
        "sqrt": 1 - math.sqrt(progress),
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[settings.decay_type]
    return settings.min_lr_factor + (1 - settings.min_lr_factor) * shape


def decay_steps(settings: LRScheduler, training_steps: int) -> int:
    """How many steps the decay takes, at the end of the schedule; 0: there is none."""
    total = settings.total_steps or training_steps
    after_warmup = max(0, total - settings.warmup_steps)
    return after_warmup if settings.decay_ratio is None else min(after_warmup, round(total * settings.decay_ratio))


def trunk_end(settings: LRScheduler, training_steps: int) -> int | None:
    """The last step of the constant part, which a longer run would go on from (WSD's trunk); None: there is none."""
    decay = decay_steps(settings, training_steps)
    end = (settings.total_steps or training_steps) - decay
    falls = decay > 0 and settings.min_lr_factor < 1
    return end if falls and settings.warmup_steps < end < training_steps else None
