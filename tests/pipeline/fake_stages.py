"""Small stage types for tests of the pipeline: no image, no model, real configs."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from pipeline.stage import Context, Input, NoFingerprint, Outcome, Settings, Source, Stage, StageConfig


class FakeStage(Stage[Any]):
    def run(self, context: Context) -> Outcome:
        context.output.put_file("data.json", b"{}")
        return Outcome()


class Ingest(FakeStage):
    kind = "images"

    class Config(StageConfig):
        source: Source = Field(description="folder of images")
        layout: Literal["folder", "masks", "coco"] = "folder"


class Superpixels(FakeStage):
    kind = "superpixels"
    packages = ("pydantic",)

    class Config(StageConfig):
        images: Input["images"]
        region_size: int = Field(20, gt=1, description="pixels")
        ratio: float = 0.5


class Embeddings(FakeStage):
    kind = "embeddings"

    class Config(StageConfig):
        images: Input["images"]
        encoder: Input["encoder"] | None = None


class Neighbors(FakeStage):
    kind = "neighbors"

    class Config(StageConfig):
        embeddings: Input["embeddings"]
        k: int = 20


class Method(Settings):
    variant_group: ClassVar[str | None] = "tests.methods"
    name: str
    weights: dict[str, float] = {}


class Plain(Method):
    temperature: float = 0.1


class WithNeighbors(Method):
    neighbors: Input["neighbors"]
    host: Method | None = None


METHODS: dict[str, type[Method]] = {"plain": Plain, "near": WithNeighbors}


def method(value: Any) -> Any:
    """Settings of the class that the name stands for, as in the real stage."""
    if isinstance(value, Method):
        return value
    if not isinstance(value, dict) or value.get("name") not in METHODS:
        raise ValueError(f"a method is a mapping with a name, one of {', '.join(METHODS)}")
    return METHODS[value["name"]].model_validate(value)


AnyMethod = Annotated[SerializeAsAny[Method], BeforeValidator(method)]


class Mix(Settings):
    from_: Input["images"] = Field(alias="from")
    weight: float = 1.0


class Pretrain(FakeStage):
    kind = "encoder"

    class Config(StageConfig):
        images: Input["images"] | list[Mix]
        init: Input["encoder"] | None = None
        method: AnyMethod
        clip: float | None = 3.0
        epochs: int = 1
        log_every: Annotated[int, NoFingerprint] = 10


STAGES: dict[str, type[Stage[Any]]] = {
    "ingest": Ingest,
    "superpixels": Superpixels,
    "embeddings": Embeddings,
    "neighbors": Neighbors,
    "pretrain": Pretrain,
}


def entry_points(*, group: str) -> list[EntryPoint]:
    """What importlib.metadata would find if the fakes were installed."""
    found: dict[str, dict[str, type]] = {"tessera.stages": STAGES, "tests.methods": METHODS}
    return [EntryPoint(name, f"{__name__}:{c.__name__}", group) for name, c in found.get(group, {}).items()]
