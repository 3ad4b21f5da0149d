"""The contract every stage meets: a config that is its signature, and a `run` that writes one artifact.

A field typed `Input["boxes"]` is an edge of the pipeline: its value in YAML is the name of another stage.
A field typed `Source` is a path or address outside the store: its *content* belongs to the fingerprint.
Nothing else declares the graph. Config classes must import fast (no torch, no Ray at module level):
planning a pipeline, and re-running a cached one, reads them and nothing more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from pipeline.store import Artifact, ArtifactWriter


@dataclass(frozen=True)
class InputKind:
    """Marks a config field as an edge to a stage whose artifact is of one of `kinds`."""

    kinds: tuple[str, ...]


@dataclass(frozen=True)
class SourceMark:
    """Marks a config field as a path or address whose content belongs to the fingerprint."""


@dataclass(frozen=True)
class NoFingerprintMark:
    """Marks a config field that cannot change the artifact, so that it never makes one stale."""


if TYPE_CHECKING:
    # To a type checker an edge is the string it is in YAML; Literal accepts the same subscripts.
    from typing import Literal as Input
else:

    class Input:
        """`Input["boxes"]`, or `Input["encoder", "embeddings"]` where either kind will do."""

        def __class_getitem__(cls, kinds: str | tuple[str, ...]) -> Any:
            return Annotated[str, InputKind((kinds,) if isinstance(kinds, str) else kinds)]


Source = Annotated[str, SourceMark()]
NoFingerprint = NoFingerprintMark()  # use: `log_every: Annotated[int, NoFingerprint] = 10`


class Settings(BaseModel):
    """Base of everything inside a config: unknown keys are errors, values do not change once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, arbitrary_types_allowed=False)


class Resources(Settings):
    """What a stage may use. Never part of the fingerprint: it changes how long a stage takes, not what it writes."""

    cpus: float | None = Field(None, gt=0, description="CPUs for one worker or task; default: the stage's own choice")
    gpus: float | None = Field(None, ge=0, description="GPUs for one worker or task; default: 1 where there is one")
    workers: int | None = Field(None, ge=0, description="Ray Train workers; 0 trains in the driver's process")
    concurrency: int | None = Field(None, ge=1, description="tasks or actors at once; default: what the cluster has")
    batch_size: int | None = Field(None, ge=1, description="images a forward pass, where it does not change results")


class StageConfig(Settings):
    """Base of every stage's `Config`."""

    resources: Annotated[Resources, NoFingerprint] = Resources()


C = TypeVar("C", bound=StageConfig)


@dataclass
class Context:
    """What the runner hands to `Stage.run`."""

    name: str  # the stage's name in the pipeline
    fingerprint: str
    inputs: Mapping[str, Artifact]  # dotted field path -> finished artifact, e.g. {"images": ..., "method.neighbors": ...}
    output: ArtifactWriter  # where the artifact grows; `output.progress` survives a kill, `output.scratch` does not
    resources: Resources
    log_metrics: Callable[[Mapping[str, float], int], None] = lambda metrics, step: None  # goes to MLflow, by the driver
    progress: Callable[[float, float, str], None] = lambda done, total, unit: None  # drives the progress bar
    say: Callable[[str], None] = print  # one line for the user


@dataclass
class Outcome:
    """What `Stage.run` reports beside the files it wrote; all of it goes into the manifest and the summary."""

    metrics: dict[str, float] = field(default_factory=dict)  # the results table shows these
    counts: dict[str, int] = field(default_factory=dict)  # e.g. {"images": 52, "unreadable": 1}
    problems: list[dict[str, str]] = field(default_factory=list)  # bad input by name: {"key": ..., "reason": ...}
    notes: dict[str, Any] = field(default_factory=dict)  # anything JSON-able worth keeping, e.g. the measured recall
    preview: str | None = None  # file name, inside the artifact, of the picture that shows it


class Stage(ABC, Generic[C]):
    """One step of a pipeline: reads finished artifacts, writes exactly one.

    A subclass sets `kind`, defines `Config` and `run`, and is registered under the entry-point group
    `tessera.stages`; the entry point's name is what YAML says after `uses:`.
    """

    kind: ClassVar[str]  # what sort of artifact it writes
    version: ClassVar[int] = 1  # raise it when the same config and inputs give a different artifact
    packages: ClassVar[tuple[str, ...]] = ()  # distributions whose version belongs to the fingerprint
    uses_ray: ClassVar[bool] = True  # the runner starts or joins Ray before `run`
    Config: ClassVar[type[StageConfig]]

    def __init__(self, config: C) -> None:
        self.config = config

    @abstractmethod
    def run(self, context: Context) -> Outcome:
        """Write the artifact's files through `context.output`; the runner commits them.

        Running again after a kill must continue from what `context.output` already holds.
        Raises: any TesseraError whose message names the rule, the place and the remedy.
        """


@dataclass(frozen=True)
class Edge:
    """One `Input` field of a validated config."""

    path: str  # dotted, relative to the stage: "method.neighbors", "images.0.from"
    kinds: tuple[str, ...]
    stage: str  # the name it holds


def edges(config: BaseModel) -> list[Edge]:
    """All `Input` fields of a validated config, nested ones and lists of them included, in field order."""
    return [Edge(path, mark.kinds, value) for path, mark, value in _marked(config, InputKind) if value is not None]


def sources(config: BaseModel) -> dict[str, str]:
    """All `Source` fields that are set: dotted path -> path or address."""
    return {path: value for path, _, value in _marked(config, SourceMark) if value is not None}


def unfingerprinted(config: BaseModel) -> list[str]:
    """Dotted paths of the fields that never change the artifact."""
    return [path for path, _, _ in _marked(config, NoFingerprintMark)]


def _marked(model: BaseModel, mark_type: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        path = f"{prefix}{info.alias or name}"
        marks = [m for m in _annotation_marks(info.annotation, info.metadata) if isinstance(m, mark_type)]
        if marks and not isinstance(value, BaseModel | list | dict):
            yield path, marks[0], value
            continue
        if marks and mark_type is NoFingerprintMark:
            yield path, marks[0], value
            continue
        yield from _nested(value, marks, mark_type, path)


def _nested(value: Any, marks: list[Any], mark_type: type, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(value, BaseModel):
        yield from _marked(value, mark_type, f"{path}.")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            if marks and isinstance(item, str):
                yield f"{path}.{i}", marks[0], item
            else:
                yield from _nested(item, marks, mark_type, f"{path}.{i}")
    elif isinstance(value, dict):
        for key, item in value.items():
            if marks and isinstance(item, str):
                yield f"{path}.{key}", marks[0], item
            else:
                yield from _nested(item, marks, mark_type, f"{path}.{key}")


def _annotation_marks(annotation: Any, metadata: list[Any]) -> list[Any]:
    """Marks on the field itself and inside its Optional, union or list arms (`Input["boxes"] | None`)."""
    found = list(metadata)
    found += getattr(annotation, "__metadata__", ())
    for arm in getattr(annotation, "__args__", ()):
        found += _annotation_marks(arm, [])
    return found
