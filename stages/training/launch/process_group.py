"""torch.distributed between Ray Train's workers, without torch in the processes that only start them.

`ray.train.torch.TorchConfig` does the same for its users, but imports torch wherever it is unpickled, so also in the
driver and in Ray Train's controller.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import ray.train
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig

from stages.training.launch.notices import listen

LEAVE_SECONDS = 10.0

logger = logging.getLogger(__name__)


@dataclass
class ProcessGroup(BackendConfig):
    """Asks Ray Train to join the workers by torch.distributed."""

    backend: str  # "nccl" or "gloo"
    limit_minutes: float  # an exchange between the ranks that takes longer has lost one, and fails

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray Train calls when the workers are there."""
        return _TorchDistributed


class _TorchDistributed(Backend):
    share_cuda_visible_devices = True  # NCCL reaches the GPU of a worker on the same node only where it is visible

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, ProcessGroup)
        address, port = worker_group.execute_single(0, _free_port)
        worker_group.execute(_join, backend_config.backend, address, port, backend_config.limit_minutes)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        try:
            ray.get(worker_group.execute_async(_leave), timeout=LEAVE_SECONDS)
        except GetTimeoutError:
            logger.warning("the workers did not leave their process group within %g s", LEAVE_SECONDS)


def _free_port() -> tuple[str, int]:
    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind(("", 0))
        return address, probe.getsockname()[1]


def _join(backend: str, address: str, port: int, limit_minutes: float) -> None:
    import torch.distributed as dist

    listen()  # here, since this is the worker's main thread, and training runs in another
    context = ray.train.get_context()
    # The names that torchrun sets; libraries that run inside a worker look for them.
    os.environ.update(
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        RANK=str(context.get_world_rank()),
        WORLD_SIZE=str(context.get_world_size()),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        NODE_RANK=str(context.get_node_rank()),
    )
    dist.init_process_group(backend, init_method="env://", timeout=timedelta(minutes=limit_minutes))


def _leave() -> None:
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
