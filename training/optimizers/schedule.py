"""Learning-rate schedules: functions of the step alone."""

import math

from turnout.training.config.optim import ScheduleConfig


def lr_at(step: int, *, lr: float, schedule: ScheduleConfig, n_steps: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    It rises linearly to `lr` over warmup_steps, then falls to final_frac * lr at the last step. cosine falls
    along half a cosine (Loshchilov and Hutter 2017, equation 5), linear along a line, and wsd (Hu et al.
    2024, section 4) stays at `lr` and falls along a line over the last decay_frac of all steps.
    """
    if step < schedule.warmup_steps:
        return lr * (step + 1) / schedule.warmup_steps
    start = schedule.warmup_steps
    if schedule.kind == "wsd":
        assert schedule.decay_frac is not None, "checked by ScheduleConfig"
        start = max(start, n_steps - round(schedule.decay_frac * n_steps))
    if step < start:
        return lr
    done_frac = min(1.0, (step - start) / max(1, n_steps - 1 - start))
    falling = 0.5 * (1 + math.cos(math.pi * done_frac)) if schedule.kind == "cosine" else 1 - done_frac
    return lr * (schedule.final_frac + (1 - schedule.final_frac) * falling)
