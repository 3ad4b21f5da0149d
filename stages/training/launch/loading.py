"""The loader processes of one rank: how many, and their start ahead of the first batch.

Imports no more of the project than they need themselves, so that they can come up while the rank imports the rest.
"""

from __future__ import annotations

import multiprocessing.forkserver
import sys

import torch

from stages.training import loader
from stages.training.settings import LoopSettings


def loader_workers(config: LoopSettings, cpus: int) -> int:
    """Loader processes a worker: on a CPU one is enough to hide the decoding, on a GPU all cores feed it."""
    if config.loader_workers is not None:
        return config.loader_workers
    if torch.cuda.is_available():
        return min(8, max(1, cpus - 1))
    return 1 if cpus > 1 else 0


def start_ahead(workers: int, module: str) -> None:
    """Start the server that loader processes are forked from: it imports torch for some seconds before the first.

    Args:
        workers: how many loader processes there will be.
        module: what they run, which imports torch.
    """
    if workers and sys.platform == "linux":
        loader.worker_context(module)
        multiprocessing.forkserver.ensure_running()
