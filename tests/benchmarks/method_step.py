"""A step of FLSL and one of CoTAP against one of dino_dense with the same student crops: `OMP_NUM_THREADS=1 python -m
tests.benchmarks.method_step [--write]`. Forward, backward and update; CPU time of one thread, or the GPU's clock.
"""

from __future__ import annotations

import argparse
from typing import Any

from stages.models.settings import Backbone
from stages.pretrain.config.method import method_settings
from tests.benchmarks.stepper import Stepper, best_of

LIMITS = {"flsl": 1.25, "cotap": 1.5}


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
    best = best_of(steppers, arguments.repeats)
    first = next(iter(best.values()))
    lines = [f"- {key}: {seconds:.3f} s, {seconds / first:.2f} times" for key, seconds in best.items()]
    what = "CPU time of one thread" if small else "bf16"
    body = f"{name}, {side} and {local} px, batch {count}, {what}; targets: " + ", ".join(
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
