"""Which stages fit beside each other on a cluster, and what each gets of it."""

from __future__ import annotations

import pytest

from pipeline.run.room import Need, Room, need_of
from pipeline.share import Share
from pipeline.stage import Context, Outcome, Resources, Stage, StageConfig


class OnRay(Stage[StageConfig]):
    kind, Config = "numbers", StageConfig

    def run(self, context: Context) -> Outcome:
        return Outcome()


class WithModel(OnRay):
    worker_gpus = 1.0


class Training(OnRay):
    worker_gpus, whole_cluster = 1.0, True


class InDriver(OnRay):
    uses_ray = False


def cluster(*nodes: tuple[float, float]) -> Share:
    return {f"n{i}": {"CPU": cpus, "GPU": gpus, "memory": 8.0} for i, (cpus, gpus) in enumerate(nodes)}


def needs(there: Share, *stages: tuple[type[OnRay], Resources], driver_cpus: float = 0.0) -> list[Need]:
    made = [stage(StageConfig(resources=resources)) for stage, resources in stages]
    return [need_of(stage, there, "n0", driver_cpus) for stage in made]


def start(room: Room, there: Share, wanted: dict[str, Need]) -> dict[str, Share | None]:
    """What starts now, in the order of `wanted`, and its share."""
    offer = room.offer(there)
    for stage, need in wanted.items():
        if offer.lane_is_busy(need):
            continue
        if not offer.fits(need):
            break
        offer.add(stage, need)
    return offer.deal()


def amounts(share: Share | None, name: str = "CPU") -> list[float]:
    assert share is not None
    return [node[name] for node in share.values()]


FREE, EXACT, ALL = (OnRay, Resources()), (Training, Resources(cpus=1)), (Training, Resources())


def test_two_stages_share_two_cpus_and_a_training_waits_for_both() -> None:
    there, room = cluster((2, 0)), Room()
    boxes, superpixels, training = needs(there, FREE, FREE, ALL)
    shares = start(room, there, {"boxes": boxes, "superpixels": superpixels, "training": training})
    assert [amounts(share) for share in shares.values()] == [[1], [1]]
    assert shares["boxes"] == {"n0": {"CPU": 1, "GPU": 0, "memory": 8}}
    room.leave("superpixels")
    assert start(room, there, {"training": training, "late": boxes}) == {}  # nobody passes the training
    room.leave("boxes")
    assert start(room, there, {"training": training, "late": boxes}) == {"training": None}


def test_one_cpu_is_used_by_one_stage_after_the_other() -> None:
    there, room = cluster((1, 0)), Room()
    first, second = needs(there, FREE, FREE)
    assert start(room, there, {"first": first, "second": second}) == {"first": None}
    assert start(room, there, {"second": second}) == {}
    room.leave("first")
    assert start(room, there, {"second": second}) == {"second": None}


def test_what_is_free_is_dealt_out_in_turn_and_alone_a_stage_has_all() -> None:
    there = cluster((3, 0), (4, 0))
    one, two, few = needs(there, FREE, FREE, (OnRay, Resources(concurrency=1)))
    assert start(Room(), there, {"one": one}) == {"one": None}
    shares = start(Room(), there, {"one": one, "two": two, "few": few})
    assert [sum(amounts(share)) for share in shares.values()] == [3, 3, 1]
    room = Room()
    assert start(room, there, {"few": few})["few"] is not None
    assert sum(amounts(start(room, there, {"one": one})["one"])) == 6  # all that "few" has left


def test_gpus_are_counted() -> None:
    there = cluster((8, 2))
    model, training, boxes = needs(there, (WithModel, Resources()), (Training, Resources(workers=1)), FREE)
    assert (training.cpus, training.gpus) == (4, 1)  # the CPUs that go with a GPU
    shares = start(Room(), there, {"training": training, "model": model, "boxes": boxes})
    assert [amounts(share, "GPU") for share in shares.values()] == [[1], [1], [0]]
    assert [amounts(share) for share in shares.values()] == [[4], [1], [3]]
    room = Room()
    (two,) = needs(there, (Training, Resources(workers=2, cpus=1)))
    assert amounts(start(room, there, {"two": two})["two"], "GPU") == [2]
    assert start(room, there, {"model": model}) == {}  # no GPU is left, though CPUs are
    room.leave("two")
    assert list(start(room, there, {"model": model})) == ["model"]


def test_trainings_that_say_what_they_take_run_side_by_side_with_just_that() -> None:
    there, room = cluster((4, 0)), Room()
    small, pair = needs(there, EXACT, (Training, Resources(workers=2, cpus=1)))
    shares = start(room, there, {"small": small, "pair": pair, "other": pair})
    assert [sum(amounts(share)) for share in shares.values()] == [1, 2]
    assert list(start(room, there, {"again": small})) == ["again"]


@pytest.mark.parametrize(
    "resources",
    [Resources(), Resources(workers=1), Resources(gpus=0), Resources(workers=2, gpus=0)],
)
def test_a_training_that_leaves_its_cpus_open_takes_the_whole_cluster(resources: Resources) -> None:
    """Its results on a CPU depend on the number of threads: they must not depend on what else runs."""
    assert needs(cluster((4, 0)), (Training, resources))[0].takes == "all"


def test_stages_in_the_driver_run_one_after_the_other_and_take_their_node() -> None:
    there, room = cluster((2, 1), (2, 0)), Room()
    judge, boxes = needs(there, (InDriver, Resources()), FREE)
    shares = start(room, there, {"judge": judge, "judge two": judge, "boxes": boxes})
    assert shares["judge"] is None
    assert list(shares) == ["judge", "boxes"]
    assert shares["boxes"] == {"n1": {"CPU": 2, "GPU": 0, "memory": 8}}
    alone = cluster((2, 0))
    assert list(start(Room(), alone, {"judge": judge, "boxes": boxes})) == ["judge"]


def test_a_driver_with_cpus_of_its_own_takes_none_of_the_cluster() -> None:
    there, room = cluster((2, 0)), Room()
    judge, training = needs(there, (InDriver, Resources()), ALL, driver_cpus=1.0)
    assert start(room, there, {"judge": judge, "training": training}) == {"judge": None, "training": None}
    assert start(room, there, {"judge two": judge}) == {}


def test_a_bound_on_stages_at_once() -> None:
    there = cluster((8, 0))
    (one,) = needs(there, FREE)
    assert list(start(Room(parallel=2), there, dict.fromkeys("abc", one))) == ["a", "b"]
    assert start(Room(parallel=1), there, dict.fromkeys("abc", one)) == {"a": None}


def test_what_is_too_large_for_the_cluster_starts_alone() -> None:
    there, room = cluster((2, 0), (2, 0)), Room()
    small, large = needs(there, FREE, (OnRay, Resources(cpus=3)))
    assert list(start(room, there, {"small": small, "large": large})) == ["small"]
    room.leave("small")
    assert start(room, there, {"large": large, "small": small}) == {"large": None}


def test_a_node_that_is_gone_or_new_is_seen() -> None:
    room = Room()
    one, two = needs(cluster((2, 0), (2, 0)), (OnRay, Resources(concurrency=2)), FREE)
    assert amounts(start(room, cluster((2, 0)), {"one": one})["one"]) == [2]
    assert start(room, cluster((2, 0)), {"two": two}) == {}
    grown = {**cluster((2, 0)), "n9": {"CPU": 4.0}}
    assert [amounts(share) for share in start(room, grown, {"two": two}).values()] == [[4]]
