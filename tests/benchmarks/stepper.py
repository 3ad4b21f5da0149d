"""One training step of a method by itself, timed: forward, backward, update and what follows it."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from stages.models.encoder import Encoder
from stages.models.settings import Backbone
from stages.pretrain.config.method import MethodSettings
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.method import Method, Step
from stages.pretrain.views.draw import draw_views, generator
from stages.training.loop import compute_total, update
from stages.training.optim import build_optimizer
from stages.training.settings import OptimizerSettings


def made_up_batch(method: Method, count: int, device: str) -> Batch:
    """Noise with the geometry of real draws from images of 500 x 375 pixels."""
    specs = method.view_plan().views
    draws = [draw_views(specs, generator(0, 0, 0, i), 500, 375) for i in range(count)]
    affines = {
        spec.name: torch.stack(
            [torch.stack([torch.from_numpy(d.affine).float() for d in row if d.view == spec.name]) for row in draws], 1
        )
        for spec in specs
    }
    ids = torch.arange(count)
    views = {spec.name: torch.randn(spec.count, count, 3, spec.size, spec.size) for spec in specs}
    embeddings = {"embedding": torch.randn(count, 512)}
    return Batch(ids, torch.zeros_like(ids), views, affines, neighbor_ids=ids, extras=embeddings, seed=1).to(device)


class Stepper:
    """One method with its optimiser, on one batch that stays."""

    def __init__(self, settings: MethodSettings, backbone: Backbone, count: int, device: str) -> None:
        torch.manual_seed(0)
        encoder = Encoder.build(backbone)
        method = settings.build(encoder, total_steps=100, steps_per_epoch=10, global_batch=count)
        self.method = method.train().to(device)
        self.optimizer = build_optimizer(self.method, OptimizerSettings())
        self.batch = made_up_batch(self.method, count, device)
        self.weights, self.device = settings.term_weights(), device

    def seconds(self) -> float:
        """One step's time: on a GPU in bf16 and by the wall clock, on a CPU by this process's CPU time.

        CPU time does not count what other processes of the machine do meanwhile.
        """
        on_gpu, step = self.device != "cpu", Step(20, 100, 10)
        clock = time.perf_counter if on_gpu else time.process_time
        start = clock()
        self.method.start_step(step)
        _, total = compute_total(self.method, self.batch, self.weights, precision="bf16" if on_gpu else "fp32")
        torch.autograd.backward(total)
        self.method.before_update(step)
        update(self.method, self.optimizer, step)
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - start


def best_of(steppers: Mapping[str, Stepper], rounds: int) -> dict[str, float]:
    """The shortest step of each in seconds, after one to warm up; in turns, so that a busy machine is so for all."""
    for stepper in steppers.values():
        stepper.seconds()
    times = [{name: stepper.seconds() for name, stepper in steppers.items()} for _ in range(rounds)]
    return {name: min(row[name] for row in times) for name in steppers}
