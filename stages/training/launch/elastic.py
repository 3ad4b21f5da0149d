"""Ray Train's trainer with what it lacks for long trainings.

Numbers of workers that divide a batch, a checkpoint before a resize, a line for the user when training starts again.
Reaches into Ray Train's inner modules, as its own interface has no place for a scaling
policy: requirements.lock holds the version that this was written against.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import ScalingConfig
from ray.train.v2._internal.constants import WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    PreemptingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    TrainControllerState,
)
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError

SAVE_LIMIT_S = 120.0  # a resize waits so long for the checkpoint before it


class UsableCounts(ElasticScalingPolicy):
    """Takes as many workers as there is room for, of the numbers that can share a batch; saves before it resizes.

    Args:
        scaling_config: with the fewest and the most workers.
        counts: the numbers of workers that training may have, ascending.
        relay: passes the wish for a checkpoint on to rank 0 (relay.py).
    """

    def __init__(self, scaling_config: ScalingConfig, counts: Sequence[int], relay: Any) -> None:
        super().__init__(scaling_config)
        self.counts, self.relay = counts, relay
        self.waiting: ResizeDecision | None = None
        self.asked_at = 0.0

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((count for count in self.counts if count <= room), default=0)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Nothing, or the resize that was decided on earlier, once the checkpoint before it is there."""
        if self.waiting is not None:
            if not self._saved() and time.monotonic() - self.asked_at < SAVE_LIMIT_S:
                return NoopDecision()
            decision, self.waiting = self.waiting, None
            return decision
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if not isinstance(decision, ResizeDecision):
            return decision
        ray.get(self.relay.wish.remote())
        self.waiting, self.asked_at = decision, time.monotonic()
        return NoopDecision()

    def make_decision_for_non_running_worker_group(self) -> Any:
        """As Ray Train decides; what was decided for the workers before is void."""
        self.waiting = None
        return super().make_decision_for_non_running_worker_group()

    def _saved(self) -> bool:
        return bool(ray.get(self.relay.is_granted.remote()))


class Reporter(ControllerCallback):
    """Says why training starts again; runs in Ray Train's controller.

    Args:
        relay: takes the lines.
        max_failures: of the run, -1 for no limit.
    """

    def __init__(self, relay: Any, max_failures: int) -> None:
        self.relay, self.max_failures, self.failures = relay, max_failures, 0

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Called whenever training goes from one state to another."""
        line = None
        if isinstance(current_state, RestartingState):
            line = self._restart(current_state.training_failed_error)
        elif isinstance(current_state, ResizingState):
            line = (
                f"the cluster has changed: training goes on with {current_state.scaling_decision.num_workers} workers"
            )
        elif isinstance(current_state, PreemptingState) and not isinstance(previous_state, PreemptingState):
            count = len(current_state.preemption_info.preempted_node_ids)
            line = f"{count} node{'s' if count > 1 else ''} of the training will be taken away: it saves now"
        elif isinstance(current_state, ReschedulingState) and not isinstance(previous_state, ReschedulingState):
            line = "training waits until the cluster has room for its workers"
        if line:
            self.relay.say.remote(line)

    def _restart(self, error: Exception) -> str:
        if isinstance(error, PreemptionError):
            return "the nodes are gone: training starts again elsewhere, from its last checkpoint"
        self.failures += 1
        limit = f" of {self.max_failures}" if self.max_failures >= 0 else ""
        return f"{_reason(error)}: training starts again from its last checkpoint (restart {self.failures}{limit})"


def _reason(error: Exception) -> str:
    """What happened to the first rank that failed, in a few words."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    # When one rank is lost, the others fail because of it: it is the one to name.
    lost = [rank for rank, why in failures.items() if isinstance(why, WorkerHealthCheckFailedError | RayActorError)]
    if lost:
        return f"rank {', '.join(map(str, sorted(lost)))} was lost"
    if any(type(why).__name__ == "TrainingInterrupted" for why in failures.values()):
        return "a rank was told to end, and training has saved"
    for rank, why in sorted(failures.items()):
        return f"rank {rank} failed ({type(why).__name__}: {(str(why).splitlines() or [''])[0]:.200})"
    return f"training failed ({(str(error).splitlines() or [''])[0]:.200})"


class Trainer(DataParallelTrainer):
    """`DataParallelTrainer` whose elastic trainings take `UsableCounts`, and which gives up ranks that do not answer.

    Args:
        counts: the numbers of workers that training may have.
        relay: actor handle.
        lost_rank_minutes: after which a rank that does not answer Ray Train is taken for lost.
        given: what DataParallelTrainer takes.
    """

    def __init__(self, *args: Any, counts: Sequence[int], relay: Any, lost_rank_minutes: float, **given: Any) -> None:
        super().__init__(*args, **given)
        self.counts, self.relay, self.lost_rank_minutes = counts, relay, lost_rank_minutes

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            given["scaling_policy"] = UsableCounts(self.scaling_config, self.counts, self.relay)
        # Where ranks meet at a checkpoint, Ray Train itself waits for them, and has no other place for a limit.
        with _set(WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR, f"{60 * self.lost_rank_minutes:g}"):
            return super()._initialize_and_run_controller(**given)


@contextmanager
def _set(name: str, value: str) -> Iterator[None]:
    """An environment variable of this process while the body runs; a user's own stays."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
