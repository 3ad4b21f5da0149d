"""A step that went wrong, kept so that it can be run again alone.

    python -m stages.pretrain.launch.replay FILE

prints every term with its weight and gradient norm and, where something is not finite, the operation whose backward
pass made it so and the parameters that it reached. The file holds the config, the addresses of the input artifacts,
the images of the batch, the seeds, and method and optimiser as they were before the step.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import ArtifactMissing, UsageError
from pipeline.stage import open_source
from pipeline.store.artifact import Artifact
from pipeline.store.writer import ArtifactWriter
from stages.pretrain.config.pretrain import PretrainConfig
from stages.pretrain.launch.assemble import assemble
from stages.pretrain.methods.method import Step
from stages.training.checkpoint import tensors_of
from stages.training.collectives import gather, rank, world_size
from stages.training.loop import BadStep, LeaveReplay, Training, Window, compute_gradients
from stages.training.settings import WatchSettings
from stages.training.watch import Watch

FORMAT = 1


def leaver(
    config: PretrainConfig, inputs: Mapping[str, Artifact], training: Training, output: ArtifactWriter
) -> LeaveReplay:
    """What the loop calls after a step that went wrong: writes a replay file beside the unfinished artifact.

    Args:
        config: of the stage.
        inputs: its artifacts, by dotted input path.
        training: as this rank sees it.
        output: where the artifact grows.
    """

    def leave(bad: BadStep) -> str:
        name = f"replay-step-{bad.step:08d}.pt"
        image_ids = [gather(ids).tolist() for ids in bad.image_ids]
        tensors = tensors_of(training.method, bad.optimizer)
        if rank() == 0:
            kept = {
                "format": FORMAT,
                "why": bad.why,
                "step": bad.step,
                "seed": config.seed,
                "image_ids": image_ids,
                "config": json.dumps(config.model_dump(mode="json", by_alias=True)),
                "inputs": {path: (a.objects.address, a.kind, a.fingerprint) for path, a in inputs.items()},
                **tensors,
            }
            data = io.BytesIO()
            torch.save(kept, data)
            output.leave(name, data.getvalue())
        if world_size() > 1:
            dist.barrier()  # the first rank to raise ends the others, and the file must be whole by then
        return f"To run that step again alone: python -m stages.pretrain.launch.replay {output.progress_address}/{name}"

    return leave


def replay(kept: Mapping[str, Any], *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Training the kept step again, in one process whatever the run had, and say what came out.

    Returns: "step"; "image_ids" (one list a forward pass); "terms" (name -> value, "total" among them); "weights" and
    "grad_norms" by term; "bad_parameters" (names with a gradient that is not finite); "culprit": the operation that
    first made one, with where the forward pass called it, or None.
    """
    if kept["format"] != FORMAT:
        raise UsageError(f"replay file of format {kept['format']}; this version reads {FORMAT}")
    config = PretrainConfig.model_validate(json.loads(kept["config"]))
    training = assemble(config, {path: Artifact.open(*where) for path, where in kept["inputs"].items()}, device=device)
    training.method.to(training.device).to(memory_format=torch.channels_last).train()
    index, accumulate = kept["step"], config.accumulate

    def once() -> Window:
        training.method.load_state_dict(kept["method"])
        training.method.zero_grad(set_to_none=True)
        window = Window(training)
        watch = Watch(WatchSettings(gradients_every=1), training.weights)
        passes = training.data.batches(index * accumulate, (index + 1) * accumulate)
        compute_gradients(
            training,
            training.method,
            Step(index, training.total_steps, training.steps_per_epoch),
            passes,
            window,
            watch,
        )
        return window

    window = once()
    values, terms = torch.stack(window.pending).mean(0).tolist(), window.names[:-1]  # the last is their total
    bad = [
        name
        for name, p in training.method.named_parameters()
        if p.grad is not None and not p.grad.isfinite().all().item()
    ]
    found = {
        "step": index,
        "image_ids": [ids.tolist() for ids in window.image_ids],
        "terms": dict(zip(window.names, values, strict=True)),
        "weights": {name: window.of_terms[f"weight/{name}"] for name in terms},
        "grad_norms": {name: window.of_terms[f"grad_norm/{name}"] for name in terms},
        "bad_parameters": bad,
        "culprit": None,
    }
    if bad or not all(map(math.isfinite, values)):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Anomaly Detection has been enabled", UserWarning)  # that it is slow
                with torch.autograd.detect_anomaly(check_nan=True):
                    once()
        except RuntimeError as error:
            found["culprit"] = "".join(traceback.format_exception_only(error)).strip()
    return found


def read(address: str) -> dict[str, Any]:
    """A replay file by its path or address. Raises: ArtifactMissing."""
    folder, _, name = address.rpartition("/")
    data = open_source(folder or ".").get(name)
    if data is None:
        raise ArtifactMissing(f"no replay file at {address}")
    kept: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return kept


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="path or address of a replay file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    kept = read(options.file)
    print(kept["why"])
    found = replay(kept, device=options.device)
    for term, value in found["terms"].items():
        weight, norm = found["weights"].get(term), found["grad_norms"].get(term)
        print(
            f"{term:<20} {value:<14.6g}" + ("" if weight is None else f" weight {weight:<8g} gradient norm {norm:.6g}")
        )
    print(f"images: {found['image_ids']}")
    if found["bad_parameters"]:
        print(f"gradients that are not finite: {', '.join(found['bad_parameters'])}")
    if found["culprit"]:
        print(found["culprit"])


if __name__ == "__main__":
    main()
