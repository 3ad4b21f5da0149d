"""What a rank does in every fine-tuning: puts the training together; on one rank tests it and writes the files."""

from __future__ import annotations

import json
import tempfile
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import save_file

from pipeline.stage import Outcome
from stages.data.pictures import curves
from stages.data.tables import Table
from stages.data.units import Units, write
from stages.finetune.data.examples import ExampleChunks, LabelledData, Prepare
from stages.finetune.model import FinetunedModel
from stages.models.encoder import Encoder
from stages.models.sync_batch_norm import convert
from stages.training.checkpoint import TrainingState
from stages.training.curves import curves_table
from stages.training.launch.work import Work
from stages.training.loader import Share
from stages.training.loop import Training
from stages.training.sampler import Sampler

GIVEN = ("step", "epoch", "lr", "weight_decay", "images_per_s")  # columns that are no result of the training


@dataclass
class Examples:
    """What is learnt from."""

    ids: Sequence[int]  # of the images
    columns: Sequence[str]  # of the images' table that `prepare` needs
    prepare: Prepare


@dataclass
class Tested:
    """What a test gave."""

    metrics: dict[str, float]
    units: Units
    table: pa.Table  # one row a test image or a class
    counts: dict[str, int]
    picture: bytes  # PNG
    problems: list[dict[str, str]] = field(default_factory=list)


class FinetuneWork(Work):
    """A fine-tuning; subclasses say what is learnt from, which model, and how it is tested."""

    terms: dict[str, float] = {}  # weights of the loss's terms that are not 1

    @abstractmethod
    def examples(self) -> Examples:
        """What is learnt from. Raises SourceError where there is nothing."""

    @abstractmethod
    def build(self, encoder: Encoder) -> FinetunedModel:
        """The model around the encoder that training starts from. Raises UsageError for an encoder of another kind."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a reader of head.safetensors must know, in JSON's types: the classes, in the order of the outputs."""

    @abstractmethod
    def test(self, model: FinetunedModel, device: torch.device) -> Tested:
        """The score on the test split. `model` is on the device, in eval mode."""

    def multiple(self, encoder: Encoder) -> int:
        """Sides of a batch's images are enlarged to a multiple of this."""
        return 1

    def assemble(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        loader_workers: int = 0,
    ) -> Training:
        """The model, its batches and its schedule lengths, for `rank` of `world_size`."""
        config, device = self.settings, torch.device(device)
        examples = self.examples()
        images = len(examples.ids)
        in_a_pass = config.batch_size // config.accumulate
        torch.manual_seed(config.seed)  # heads start the same on every rank and in every world size
        encoder = Encoder.load(self.inputs["encoder"])
        model = self.build(encoder)
        if world_size > 1:
            convert(model)  # batch norms see the global batch
        data = LabelledData(
            ExampleChunks(
                Table.open(self.inputs["images"], columns=["key", "image", "width", "height", *examples.columns]),
                examples.ids,
                examples.prepare,
                Sampler([images], [1.0], in_a_pass, config.seed),
                config.seed,
            ),
            Share(in_a_pass, rank, world_size, loader_workers),
            encoder.mean,
            encoder.std,
            self.multiple(encoder),
            device,
        )
        steps = config.total_steps(images), config.steps_per_epoch(images)
        return Training(model, data, config, self.terms, *steps, device)

    def write(self, training: Training, state: TrainingState) -> Outcome:
        """Test, then write the encoder, its head, curves, scores and their units."""
        model, output = training.method, self.output
        assert isinstance(model, FinetunedModel)
        tested = self.test(model.to(training.device).eval(), training.device)
        model.cpu()
        with tempfile.TemporaryDirectory() as folder:
            facts = self.facts()
            for file in sorted(model.encoder().save(Path(folder), method=f"fine-tuned {facts['task']}")):
                output.put_file(file.name, file)
            head = Path(folder) / "head.safetensors"
            save_file({name: value.detach().contiguous() for name, value in model.head_state().items()}, head)
            output.put_file(head.name, head)
        output.put_file("head.json", json.dumps({"format": 1, **facts}, indent=2, sort_keys=True).encode())
        output.put_file("curves.json", json.dumps(state.curves).encode())
        output.put_file("curves.parquet", curves_table(state.curves))
        output.put_file("curves.png", self._picture(state))
        output.put_table(0, tested.table)
        write(output, self.settings, tested.metrics, tested.units)
        output.put_file("preview.png", tested.picture)
        last = state.curves[-1]
        return Outcome(
            metrics={**tested.metrics, "loss": last["total"]},
            counts={
                "steps": state.step,
                **tested.counts,
                **{f"skipped: {reason}": n for reason, n in state.skipped.items()},
            },
            problems=[{"key": key, "reason": reason} for key, reason in state.problems.items()] + tested.problems,
            notes={
                "ranks": {str(step): ranks for step, ranks in state.worlds.items()},
                "width": model.encoder().width,
                "vector_width": model.encoder().vector_width,
            },
            preview="preview.png",
        )

    def _picture(self, state: TrainingState) -> bytes:
        names = dict.fromkeys(name for row in state.curves for name in row)
        shown = [name for name in names if name not in GIVEN and not name.startswith("weight/")]
        series = {name: [(row["step"], row[name]) for row in state.curves if name in row] for name in shown}
        return curves(series, title="terms and watched figures by step")
