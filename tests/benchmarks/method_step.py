"""A step of FLSL and one of CoTAP against one of dino_dense with the same student crops: `OMP_NUM_THREADS=1 python -m
tests.benchmarks.method_step [--write]`. Forward, backward and update; CPU time of one thread, or the GPU's clock.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from stages.models.encoder import Encoder
from stages.models.settings import Backbone
from stages.pretrain.batch import Batch
from stages.pretrain.loop import weighted_sum
from stages.pretrain.methods.method import Method, Step
from stages.pretrain.optim import build_optimizer
from stages.pretrain.settings.loop import OptimizerSettings
from stages.pretrain.settings.method import MethodSettings, method_settings
from stages.pretrain.views.draw import draw_views, generator

LIMITS = {"flsl": 1.25, "cotap": 1.5}


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
    return Batch(ids, torch.zeros_like(ids), views, affines, neighbor_ids=ids, seed=1).to(device)


class Stepper:
    """One method with its optimiser, on one batch that stays."""

    def __init__(self, settings: MethodSettings, backbone: Backbone, count: int, device: str) -> None:
        torch.manual_seed(0)
        encoder = Encoder.build(backbone)
        self.method = (
            settings.build(encoder, total_steps=100, steps_per_epoch=10, global_batch=count).train().to(device)
        )
        self.optimizer = build_optimizer(self.method, OptimizerSettings())
        self.batch, self.weights, self.device = (
            made_up_batch(self.method, count, device),
            settings.term_weights(),
            device,
        )

    def seconds(self) -> float:
        on_gpu, step = self.device != "cpu", Step(20, 100, 10)
        clock = time.perf_counter if on_gpu else time.process_time
        start = clock()
        self.method.start_step(step)
        with torch.autocast(self.device, torch.bfloat16, enabled=on_gpu):
            terms = self.method(self.batch)
        weighted_sum(terms, self.weights).backward()  # type: ignore[no-untyped-call]
        self.method.before_update(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(step)
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    small = arguments.device == "cpu"
    side, local, count, name = (128, 64, 16, "vit_tiny") if small else (224, 96, 128, "vit_small")
    kwargs = {"depth": 6} if small else {}
    head = {"prototypes": 512, "hidden": 512, "bottleneck": 128} if small else {"prototypes": 4096}
    backbone: dict[str, Any] = {"name": f"{name}_patch16_224", "img_size": side, "kwargs": kwargs}
    local_crops = {"size": local, "count": 2, "scale": (0.1, 0.4)}
    flsl = {"name": "flsl", "teacher_crop": {"size": side}, "head": head, "local_crops": local_crops}

    def globals_(number: int) -> dict[str, Any]:
        return {"global_crops": {"size": side, "count": number, "scale": (0.5, 1.0)}}

    dense_head = head | {"prototypes": 300}
    dino_dense = {"name": "dino_dense", "head": head, "dense_head": dense_head, "local_crops": local_crops}
    cotap = {
        "name": "cotap",
        "neighbors": "neighbors",
        "image_head": head,
        "dense_head": dense_head,
        "local_crops": local_crops,
    }
    plain, tokens = (
        Backbone.model_validate(backbone | more) for more in ({}, {"class_token": False, "pos_embed": "sincos"})
    )
    steppers = {
        "dino_dense, 2 global and 2 local crops": Stepper(
            method_settings(dino_dense | globals_(2)), plain, count, arguments.device
        ),
        "flsl, the same crops": Stepper(method_settings(flsl | globals_(2)), tokens, count, arguments.device),
        "cotap (cross_view), the same crops and a neighbour's": Stepper(
            method_settings(cotap | globals_(2)), plain, count, arguments.device
        ),
        "flsl, as published (1 global and 2 local crops)": Stepper(
            method_settings(flsl | globals_(1)), tokens, count, arguments.device
        ),
    }
    for stepper in steppers.values():
        stepper.seconds()
    # In turns, so that a busy machine is equally busy for all.
    rounds = [{key: stepper.seconds() for key, stepper in steppers.items()} for _ in range(arguments.repeats)]
    best = {key: min(times[key] for times in rounds) for key in steppers}
    first = next(iter(best.values()))
    lines = [f"- {key}: {seconds:.3f} s, {seconds / first:.2f} times" for key, seconds in best.items()]
    what = "CPU time of one thread" if small else "bf16"
    body = f"{name}, {side} and {local} px, batch {count}, {what}; asked for: " + ", ".join(
        f"{name} at most {limit}" for name, limit in LIMITS.items()
    )
    body += ".\n\n" + "\n".join(lines)
    print(body)
    if arguments.write:
        from tests.benchmarks.results import write_section

        command = "OMP_NUM_THREADS=1 python -m tests.benchmarks.method_step --write"
        write_section("One step: FLSL and CoTAP against dino_dense", command, body)


if __name__ == "__main__":
    main()
