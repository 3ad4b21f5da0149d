"""What DSA adds to a SimCLR step: `python -m tests.benchmarks.dsa_step`.

One whole training step (forward, backward, optimiser) of SimCLR alone, with DSA on cached auxiliary features, and with
DSA on an online auxiliary encoder, in turns in the same process. `--full` is ResNet-50 at batch 256 and 224 pixels, as
in the paper, for a GPU.
"""

from __future__ import annotations

import argparse

import torch

from stages.models.settings import Backbone
from stages.pretrain.config.method import method_settings
from tests.benchmarks.results import write_section
from tests.benchmarks.stepper import Stepper, best_of


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
    steppers = {
        name: Stepper(method_settings(config), Backbone(name=chosen.backbone), chosen.batch, chosen.device)
        for name, config in kinds.items()
    }
    best = best_of(steppers, chosen.repeats)
    lines = [
        f"{chosen.backbone}, batch {chosen.batch}, two views of {chosen.size} pixels, {chosen.device}: best of "
        f"{chosen.repeats} whole steps, in turns. The limit is 15 % on top of SimCLR.",
        "",
        "| method | seconds a step | on top of SimCLR |",
        "| --- | --- | --- |",
        *(f"| {name} | {value:.3f} | {100 * (value / best['SimCLR'] - 1):+.1f} % |" for name, value in best.items()),
        "",
        "Online adds a frozen ResNet-18's forward pass on both views, by operations 15 % of a ResNet-50's step (1.8 of "
        "3 x 4.1 G): use cached features where that matters.",
    ]
    print("\n".join(lines))
    if chosen.write:
        flags = (
            " --full" if chosen.full else f" --backbone {chosen.backbone} --batch {chosen.batch} --size {chosen.size}"
        )
        threads = f"OMP_NUM_THREADS={torch.get_num_threads()} " if chosen.device == "cpu" else ""
        command = (
            f"{threads}python -m tests.benchmarks.dsa_step --device {chosen.device}{flags} --repeats {chosen.repeats}"
        )
        write_section(f"A SimCLR step with DSA ({chosen.device})", command, "\n".join(lines))


if __name__ == "__main__":
    main()
