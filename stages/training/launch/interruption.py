"""The driver's wait for a training on Ray Train: when the run is interrupted, it asks for a checkpoint first.

Imports no torch.
"""

from __future__ import annotations

import time
from typing import Any

from pipeline.stage import interruptible

LAST_SAVE_S = 10.0  # an interrupted run waits so long for the checkpoint that it asks for


def fit(trainer: Any, relay: Any) -> Any:
    """What `trainer.fit` returns.

    It runs in a thread of its own: in the main thread Ray Train would take SIGINT for itself, and end the workers
    before they have saved.

    Args:
        trainer: of Ray Train.
        relay: actor handle: passes the wish for a checkpoint on to rank 0.

    Raises:
        KeyboardInterrupt, SystemExit: the run was interrupted; a checkpoint was made, if that took no longer than
            `LAST_SAVE_S`.
    """
    try:
        return interruptible(trainer.fit)
    except (KeyboardInterrupt, SystemExit):
        _save(relay)
        raise


def _save(relay: Any) -> None:
    import ray

    try:
        if not ray.get(relay.is_training.remote(), timeout=5):
            return
        ray.get(relay.wish.remote(), timeout=5)
        end = time.monotonic() + LAST_SAVE_S
        while time.monotonic() < end and not ray.get(relay.is_granted.remote(), timeout=5):
            time.sleep(0.1)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
        pass  # the cluster is gone: the last checkpoint is what there is
