"""The `encoder` stage: a timm model, a checkpoint file or random weights as an artifact that evaluations can read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from pipeline.errors import UsageError
from pipeline.stage import Context, Input, Outcome, Stage, StageConfig
from stages.models import weights
from stages.models.settings import Backbone

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact


class EncoderConfig(StageConfig):
    """Which encoder."""

    backbone: Backbone | None = Field(None, description="a timm model: random, pretrained, or from a checkpoint file")
    like: Input["encoder"] | None = Field(
        None, description="instead of a backbone: random weights in the shape of this encoder, filter included"
    )
    seed: int = Field(0, ge=0, description="of random weights")

    @model_validator(mode="after")
    def _one_origin(self) -> EncoderConfig:
        if (self.backbone is None) == (self.like is None):
            raise ValueError("backbone, like: give exactly one of the two")
        return self


class UntrainedEncoder(Stage[EncoderConfig]):
    """backbone -> encoder. What a comparison measures others by: random weights, or published ones."""

    kind = "encoder"
    packages = ("timm",)
    uses_ray = False
    tracked_as = "model"
    exports = ("encoder.safetensors", "encoder.json", "*.safetensors")
    Config = EncoderConfig

    def obstacles(self, say: Callable[[str], None]) -> Iterator[tuple[str, str, str]]:
        """Weights that cannot be had."""
        yield from weights.obstacles(self.config, say)

    @classmethod
    def complete_export(cls, artifact: Artifact, folder: Path) -> list[Path]:
        """The code that computes the encoder's features, and a README."""
        from stages.models.export import complete

        return complete(artifact, folder)

    def run(self, context: Context) -> Outcome:
        """Build it and write its files.

        Raises: UsageError or SourceError for a backbone that cannot be built.
        """
        import torch

        from stages.models.encoder import Encoder

        config = self.config
        if config.backbone is not None:
            torch.manual_seed(config.seed)
            try:
                encoder = Encoder.build(config.backbone, say=context.say)
            except UsageError as error:
                raise UsageError(f"stages.{context.name}: {error}") from error
        else:
            encoder = Encoder.load(context.inputs["like"]).untrained_twin(config.seed)
        with tempfile.TemporaryDirectory() as folder:
            for file in sorted(encoder.save(Path(folder))):
                context.output.put_file(file.name, file)
        parameters = sum(parameter.numel() for parameter in encoder.parameters())
        return Outcome(
            counts={"parameters": parameters}, notes={"width": encoder.width, "vector_width": encoder.vector_width}
        )
