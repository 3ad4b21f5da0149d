"""Where a training begins, in the driver: in this process, or on Ray Train.

Imports no torch: with Ray Train the driver needs none.
"""

from __future__ import annotations

from pipeline.stage import Context, Outcome
from stages.training.launch.relay import CurveLog
from stages.training.launch.work import Launch


def start(launch: Launch, context: Context) -> Outcome:
    """Train (or continue), in the driver's own process or on Ray Train, and write the artifact's files."""
    curves = CurveLog(context)
    if launch.config.resources.workers == 0:
        from stages.training.launch import alone

        return alone.train_alone(launch, context, curves)
    from stages.training.launch.ray_train import train_on_ray

    return train_on_ray(launch, context, curves)
