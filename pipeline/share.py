"""What the work at hand may use of its Ray cluster: all of it, or the share that a stage among others was given."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

DRIVER_CPUS = "TESSERA_DRIVER_CPUS"  # environment variable: the CPUs that a submitted run's own job holds

Share: TypeAlias = Mapping[str, Mapping[str, float]]
"""Node id -> what may be used of that node, by Ray's names: CPU, GPU, memory, ..."""

_SHARE: ContextVar[Share | None] = ContextVar("share", default=None)  # None: the whole cluster, as it is when asked


def nodes() -> list[dict[str, float]]:
    """What the caller may use of each living node of its Ray cluster, by Ray's names: CPU, GPU, memory, ...

    In a stage that runs beside others, its share; else all nodes. Ask in the thread that runs the stage.
    """
    return [dict(node) for node in nodes_by_id().values()]


def nodes_by_id() -> Share:
    """The same, by the ids of the nodes.

    The driver of a submitted run holds CPUs of its own node (`DRIVER_CPUS`): those are taken off.
    """
    share = _SHARE.get()
    if share is not None:
        return share
    import ray

    held, own = float(os.environ.get(DRIVER_CPUS, 0)), own_node()
    found = {}
    for node in ray.nodes():
        if node["Alive"]:
            has = dict(node["Resources"])
            has["CPU"] = has.get("CPU", 0.0) - (held if node["NodeID"] == own else 0.0)
            found[node["NodeID"]] = has
    return found


def own_node() -> str:
    """The id of the node that this process runs on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


@contextmanager
def within(share: Share | None) -> Iterator[None]:
    """Let `nodes` answer with this share while the body runs, in this thread; None changes nothing."""
    token = _SHARE.set(share) if share is not None else None
    try:
        yield
    finally:
        if token is not None:
            _SHARE.reset(token)
