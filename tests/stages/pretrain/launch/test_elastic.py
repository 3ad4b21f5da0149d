"""Numbers of workers that may change: which are taken, when a resize comes, what is refused, what the user is told."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from pipeline.errors import UsageError
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.fit import check_start
from stages.pretrain.stage import Pretrain
from stages.training.launch.relay import Relay
from tests.stages.pretrain.conftest import SMALL

# Ray reads its access token when it is imported, so that nothing here imports it before a test runs.
if TYPE_CHECKING:
    from stages.training.launch.elastic import UsableCounts

SCALING = "ray.train.v2._internal.execution.scaling_policy.ElasticScalingPolicy"


class Actor:
    """Calls of an actor's methods, made at once in this process."""

    def __init__(self, inner: object) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.inner, name))


@pytest.fixture
def relay(monkeypatch: pytest.MonkeyPatch) -> Relay:
    monkeypatch.setattr("stages.training.launch.elastic.ray", SimpleNamespace(get=lambda value: value))
    return Relay()


@pytest.fixture
def policy(relay: Relay) -> UsableCounts:
    from ray.train import ScalingConfig

    from stages.training.launch.elastic import UsableCounts

    scaling = ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 1})
    return UsableCounts(scaling, [1, 2, 4], Actor(relay))


@pytest.mark.parametrize(("cpus", "workers"), [(0, 0), (1, 1), (2, 2), (3, 2), (4, 4), (9, 4)])
def test_of_the_room_there_is_a_number_is_taken_that_divides_the_batch(
    policy: UsableCounts, cpus: int, workers: int
) -> None:
    assert policy._count_possible_workers({"a": {"CPU": cpus // 2}, "b": {"CPU": cpus - cpus // 2}}) == workers


def test_a_resize_waits_for_its_checkpoint(policy: UsableCounts, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

    decisions: list[Any] = [ResizeDecision(4, {"CPU": 1})]
    monkeypatch.setattr(
        f"{SCALING}.make_decision_for_running_worker_group",
        lambda self, state, status: decisions.pop() if decisions else NoopDecision(),
    )

    def decide() -> Any:
        return policy.make_decision_for_running_worker_group(None, None)

    assert isinstance(decide(), NoopDecision)
    assert relay.wished() == 1
    assert isinstance(decide(), NoopDecision)
    relay.saved()
    assert decide().num_workers == 4
    assert isinstance(decide(), NoopDecision)


def test_a_resize_does_not_wait_for_ever(policy: UsableCounts, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

    from stages.training.launch.elastic import SAVE_LIMIT_S

    resize = ResizeDecision(4, {"CPU": 1})
    monkeypatch.setattr(f"{SCALING}.make_decision_for_running_worker_group", lambda *given: resize)
    assert isinstance(policy.make_decision_for_running_worker_group(None, None), NoopDecision)
    policy.asked_at -= SAVE_LIMIT_S
    assert policy.make_decision_for_running_worker_group(None, None) is resize


def test_every_new_start_is_said_with_its_reason(relay: Relay) -> None:
    from ray.exceptions import RayActorError
    from ray.train import PreemptionInfo
    from ray.train.v2._internal.execution.controller.state import PreemptingState, RestartingState, RunningState
    from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError

    from stages.training.launch.elastic import Reporter

    reporter = Reporter(Actor(relay), max_failures=3)
    lost = WorkerGroupError("", {0: ConnectionError("reset by peer"), 1: RayActorError()})
    failed = WorkerGroupError("", {1: ValueError("no such crop\nand more")})
    info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"n": [1]})
    states = [
        RestartingState(lost),
        RestartingState(failed),
        PreemptingState(info, detected_at_s=0.0),
        RestartingState(PreemptionError(info)),
    ]
    for state in states:
        reporter.after_controller_state_update(RunningState(), state)
    assert relay.drain()[1] == [
        "rank 1 was lost: training starts again from its last checkpoint (restart 1 of 3)",
        "rank 1 failed (ValueError: no such crop): training starts again from its last checkpoint (restart 2 of 3)",
        "1 node of the training will be taken away: it saves now",
        "the nodes are gone: training starts again elsewhere, from its last checkpoint",
    ]


def configured(**changes: Any) -> PretrainConfig:
    return PretrainConfig.model_validate({**SMALL, "steps": 1, **changes})


def refused(**changes: Any) -> list[str]:
    stage = Pretrain(configured(**changes))
    feeds: Any = {"images": SimpleNamespace(notes={"splits": {"train": 99}}, kind="images", fingerprint="f", stage="i")}
    return [f"{path}: {what}" for path, what, _ in stage.mismatches(feeds)]


def test_a_plan_refuses_the_fewest_or_the_most_workers_when_they_cannot_share_a_batch() -> None:
    assert refused(batch_size=8, resources={"workers": {"min": 1, "max": 4}}) == []
    assert refused(batch_size=8, resources={"workers": {"min": 3, "max": 4}}) == [
        "batch_size: a forward pass has 8 images, which 3 workers cannot share equally"
    ]
    assert len(refused(batch_size=8, resources={"workers": {"min": 3, "max": 5}})) == 2


def test_numbers_in_between_are_left_out_and_named() -> None:
    said: list[str] = []
    context: Any = SimpleNamespace(inputs={}, say=said.append)
    notes: Any = SimpleNamespace(manifest=SimpleNamespace(notes={"splits": {"train": 99}}))
    context.inputs = {"images": notes}
    check_start(configured(batch_size=8), context, (1, 4))
    assert len(said) == 1
    assert said[0].startswith("resources.workers: of 1 to 4 workers, 1, 2, 4 can share a batch equally")
    with pytest.raises(UsageError, match="3 workers cannot share equally"):
        check_start(configured(batch_size=8), context, (3, 4))


@pytest.mark.parametrize(
    ("workers", "rule"),
    [({"min": 3, "max": 2}, "min: 3 is more than max: 2"), ({"min": 0, "max": 2}, "greater than or equal to 1")],
)
def test_ranges_that_are_none_are_refused(workers: dict[str, int], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        configured(resources={"workers": workers})


def test_a_range_survives_the_way_to_the_workers() -> None:
    config = configured(resources={"workers": {"min": 1, "max": 4}})
    again = PretrainConfig.model_validate(config.model_dump(mode="json", by_alias=True))
    assert again.resources.worker_counts == (1, 4)
    count: Callable[[Any], Any] = lambda workers: configured(resources={"workers": workers}).resources.worker_counts  # noqa: E731
    assert (count(2), count(0), count(None)) == ((2, 2), (0, 0), None)
