"""What DSA adds to a SimCLR step: `python -m tests.benchmarks.dsa_step`.

One whole training step (forward, backward, optimiser) of SimCLR alone, with DSA on cached auxiliary features, and with
DSA on an online auxiliary encoder, in turns in the same process. On a CPU times are those of the process, so that
other work on the machine does not count. `--full` is the acceptance case, ResNet-50 at batch 256.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from stages.models.encoder import Encoder
from stages.models.settings import Backbone
from stages.pretrain.batch import Batch
from stages.pretrain.methods.method import Method, Step
from stages.pretrain.settings.method import method_settings
from tests.benchmarks.results import write_section


def a_batch(count: int, size: int, device: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        torch.arange(count),
        torch.zeros(count, dtype=torch.long),
        {"global": torch.randn(2, count, 3, size, size, generator=generator)},
        {"global": torch.eye(2, 3).expand(2, count, 2, 3)},
        extras={"embedding": torch.randn(count, 512, generator=generator)},
    ).to(device)


def a_step(config: dict[str, Any], backbone: str, batch: Batch, device: str) -> Callable[[], None]:
    torch.manual_seed(0)
    encoder = Encoder.build(Backbone(name=backbone))
    method: Method = method_settings(config).build(
        encoder, total_steps=100, steps_per_epoch=10, global_batch=len(batch)
    )
    method.to(device).train()
    optimizer = torch.optim.AdamW(method.parameter_groups(), lr=1e-4)
    step = Step(0, 100, 10)
    weights = method_settings(config).term_weights()

    def run() -> None:
        method.start_step(step)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            terms = method(batch)
        torch.stack([weights[name] * term for name, term in terms.items()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step)

    return run


def seconds(run: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=64, help="side of a view in pixels; the paper's is 224")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="ResNet-50, batch 256, views of 224 pixels")
    parser.add_argument("--write", action="store_true", help="put the figures into RESULTS.md")
    chosen = parser.parse_args()
    if chosen.full:
        chosen.backbone, chosen.batch, chosen.size = "resnet50", 256, 224
    host = {"name": "simclr", "size": chosen.size}
    auxiliary = {"name": "resnet18", "img_size": chosen.size}  # its own size is 224: small views would be enlarged
    kinds = {
        "SimCLR": host,
        "SimCLR + DSA, cached features": {"name": "dsa", "host": host, "embeddings": "cached"},
        "SimCLR + DSA, online ResNet-18": {"name": "dsa", "host": host, "auxiliary": auxiliary},
    }
    batch = a_batch(chosen.batch, chosen.size, chosen.device)
    steps = {name: a_step(config, chosen.backbone, batch, chosen.device) for name, config in kinds.items()}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(chosen.repeats + 1):
        for name, run in steps.items():
            taken = seconds(run, chosen.device)
            if turn:  # the first one warms up
                times[name].append(taken)
    best = {name: min(values) for name, values in times.items()}
    lines = [
        f"{chosen.backbone}, batch {chosen.batch}, two views of {chosen.size} pixels, {chosen.device}: best of "
        f"{chosen.repeats} whole steps, in turns. The limit is 15 % on top of SimCLR.",
        "",
        "| method | seconds a step | on top of SimCLR |",
        "| --- | --- | --- |",
        *(f"| {name} | {value:.3f} | {100 * (value / best['SimCLR'] - 1):+.1f} % |" for name, value in best.items()),
    ]
    print("\n".join(lines))
    if chosen.write:
        flags = (
            " --full" if chosen.full else f" --backbone {chosen.backbone} --batch {chosen.batch} --size {chosen.size}"
        )
        command = f"python -m tests.benchmarks.dsa_step --device {chosen.device}{flags}"
        write_section(f"A SimCLR step with DSA ({chosen.device})", command, "\n".join(lines))


if __name__ == "__main__":
    main()
