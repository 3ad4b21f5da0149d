"""The contract every stage meets: a config that is its signature, and a `run` that writes one artifact.

A field typed `Input["boxes"]` is an edge of the pipeline: its value in YAML is the name of another stage.
A field typed `Source` is a path or address outside the store: its *content* belongs to the fingerprint.
Nothing else declares the graph. A module with a config class must import fast (no torch, no Ray at module level),
because planning a pipeline imports it, also when everything is cached.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator
from pydantic.fields import FieldInfo
from typing_extensions import TypeAliasType

from pipeline.paths import local_path
from pipeline.progress import ProgressCallback
from pipeline.share import DRIVER_CPUS, nodes
from pipeline.threads import interruptible

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.store.artifact import Artifact
    from pipeline.store.objects import Objects
    from pipeline.store.writer import ArtifactWriter

__all__ = [
    "DRIVER_CPUS",
    "Context",
    "Edge",
    "Feed",
    "Input",
    "NoFingerprint",
    "Outcome",
    "ProgressCallback",
    "Resources",
    "Settings",
    "Source",
    "Stage",
    "StageConfig",
    "StopPoint",
    "WorkerRange",
    "edges",
    "interruptible",
    "local_path",
    "nodes",
    "open_source",
    "sources",
    "stop_points",
    "unfingerprinted",
]


@dataclass(frozen=True)
class InputKind:
    """Marks a config field as an edge to a stage whose artifact is of one of `kinds`."""

    kinds: tuple[str, ...]

    def __get_pydantic_json_schema__(self, core: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {**handler(core), "description": f"the name of a stage of kind {' or '.join(self.kinds)}"}


@dataclass(frozen=True)
class SourceMark:
    """Marks a config field as a path or address whose content belongs to the fingerprint."""

    def __get_pydantic_json_schema__(self, core: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {
            **handler(core),
            "description": "a path (from the working folder) or an s3://, gs://, az:// address; its content counts",
        }


@dataclass(frozen=True)
class NoFingerprintMark:
    """Marks a config field that cannot change the artifact, so that it never makes one stale."""


@dataclass(frozen=True)
class StopPointMark:
    """Marks a config field that says how far a stage goes along its work; null, its default, is all of it.

    Null is left out of the fingerprint. A stage that stops early and the same stage without the stop share what
    survives a kill (`ArtifactWriter.progress_folder`), so that the later one goes on where the earlier one stopped.
    """


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
StopPoint = StopPointMark()  # use: `stop_at: Annotated[int | None, StopPoint] = None`


class Settings(BaseModel):
    """Base of everything inside a config. Unknown keys are errors, and values cannot be changed."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        arbitrary_types_allowed=False,
        ser_json_inf_nan="constants",  # else infinity would be null in a dump, and in the fingerprint
    )
    # Entry-point group of the classes that may stand in for this one, chosen by the key `name`; None: only itself.
    variant_group: ClassVar[str | None] = None


class WorkerRange(Settings):
    """Between how many Ray Train workers a training may have; it grows and shrinks with the cluster."""

    min: int = Field(ge=1, description="it waits until so many fit")
    max: int = Field(ge=1, description="it takes no more")

    @model_validator(mode="after")
    def _in_order(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min: {self.min} is more than max: {self.max}")
        return self


class Resources(Settings):
    """What a stage may use. Never part of the fingerprint: it changes how long a stage takes, not what it writes."""

    cpus: float | None = Field(None, gt=0, description="CPUs for one worker or task; default: the stage's own choice")
    gpus: float | None = Field(None, ge=0, description="GPUs for one worker or task; default: 1 where there is one")
    workers: NonNegativeInt | WorkerRange | None = Field(None, description="Ray Train workers; 0: the driver trains")
    concurrency: int | None = Field(None, ge=1, description="tasks or actors at once; default: what the cluster has")
    batch_size: int | None = Field(None, ge=1, description="images a forward pass, where it does not change results")

    @property
    def worker_counts(self) -> tuple[int, int] | None:
        """The fewest and the most workers asked for; None where the stage decides."""
        asked = self.workers
        return (asked.min, asked.max) if isinstance(asked, WorkerRange) else None if asked is None else (asked, asked)


class StageConfig(Settings):
    """Base of every stage's `Config`."""

    resources: Annotated[Resources, NoFingerprint] = Resources()


C = TypeVar("C", bound=StageConfig)
M = TypeVar("M")


@dataclass
class Context:
    """What the runner hands to `Stage.run`."""

    name: str  # the stage's name in the pipeline
    fingerprint: str
    inputs: Mapping[str, Artifact]  # dotted field path -> finished artifact: {"images": ..., "method.neighbors": ...}
    output: ArtifactWriter  # where the artifact grows; its `progress_folder` survives a kill, its `scratch` does not
    resources: Resources
    log_metrics: Callable[[Mapping[str, float], int], None] = lambda metrics, step: None  # to MLflow, by the driver
    report_progress: ProgressCallback = lambda done, total, unit: None  # drives the progress bar
    show_figures: Callable[[str], None] = lambda text: None  # a few words beside the bar: "loss 2.31, lr 1e-3"
    say: Callable[[str], None] = print  # one line for the user


@dataclass(frozen=True)
class Feed:
    """An input as the plan knows it: which artifact will be read, and what that one is made from."""

    stage: str  # its name in the pipeline
    kind: str
    fingerprint: str
    inputs: Mapping[str, Feed]  # dotted field path -> what feeds that stage
    config: StageConfig  # that stage's settings
    counts: Mapping[str, int] | None = None  # of its artifact's manifest; None as long as it is not made
    notes: Mapping[str, Any] | None = None  # likewise


@dataclass
class Outcome:
    """What `Stage.run` reports beside the files it wrote; all of it goes into the manifest and the summary."""

    metrics: dict[str, float] = field(default_factory=dict)  # the results table shows these
    counts: dict[str, int] = field(default_factory=dict)  # e.g. {"images": 52, "unreadable": 1}
    problems: list[dict[str, str]] = field(default_factory=list)  # bad input by name: {"key": ..., "reason": ...}
    notes: dict[str, Any] = field(default_factory=dict)  # other facts, in JSON's types, e.g. the measured recall
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
    # How large a share of the cluster it gets where `resources:` do not say (`pipeline.stage.nodes` answers with it).
    whole_cluster: ClassVar[bool] = False  # all of it, however long that must be waited for; else what is free
    worker_gpus: ClassVar[float] = 0.0  # GPUs that each of its workers takes where the cluster has any
    shows_metrics: ClassVar[bool] = False  # its metrics are results: `tessera run` lists them, the parent run logs them
    # Metric -> unit, such as "%". A metric called x_random is x of an untrained encoder: it is shown beside x.
    units: ClassVar[Mapping[str, str]] = {}
    # Metric -> which way is better: what a sweep may have as its objective. Empty: any metric, more is better.
    objectives: ClassVar[Mapping[str, Literal["max", "min"]]] = {}
    tracked_as: ClassVar[Literal["dataset", "model"]] = "dataset"  # what its artifact is in MLflow's terms
    change_remarks: ClassVar[
        Mapping[str, str]
    ] = {}  # field path -> what a plan adds to the reason when the field is changed
    exports: ClassVar[tuple[str, ...]] = ()  # names of the files that `tessera export` copies, or patterns (*.json)
    Config: ClassVar[type[StageConfig]]

    def __init__(self, config: C) -> None:
        self.config = config

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[tuple[str, str, str]]:
        """What is wrong with this stage beside these inputs. Most stages have nothing to check.

        Asked of every stage that must run: when the plan is made, and again whenever an artifact of the run is
        finished, since its counts and notes are known from then on. Must be fast, and read no artifact.

        Args:
            feeds: dotted field path -> what feeds this stage there.

        Yields:
            (field path, what is wrong, what to do).
        """
        yield from ()

    def obstacles(self, say: Callable[[str], None]) -> Iterator[tuple[str, str, str]]:
        """What would stop this stage on this machine today: weights that cannot be downloaded or do not fit, ...

        Asked of every stage that must run when a run starts, before anything else, and by `tessera doctor`. May read
        files and ask the network, for a few seconds; must not start Ray.

        Args:
            say: for one line that the user should know though nothing is wrong.

        Yields:
            (field path, what is wrong, what to do).
        """
        yield from ()

    @classmethod
    def complete_export(cls, artifact: Artifact, folder: Path) -> list[Path]:
        """Add to exported files what their reader needs: code, a README. Most stages add nothing.

        Args:
            artifact: what is exported.
            folder: holds the files that `exports` names, under their plain names.

        Returns:
            The files added.

        Raises:
            UsageError: the artifact cannot be used elsewhere; nothing is exported then.
        """
        return []

    @classmethod
    def resampled(cls, artifact: Artifact, draws: int, seed: int) -> Mapping[str, NDArray[Any]]:
        """The metrics of an artifact again, on `draws` bootstrap samples of what it was tested on (`tessera compare`).

        Artifacts with the same test units are drawn alike. Empty where an artifact does not tell its units.
        """
        return {}

    @abstractmethod
    def run(self, context: Context) -> Outcome:
        """Write the artifact's files through `context.output`; the runner commits them.

        When it is run again after a kill, it must continue from what `context.output` already holds.

        Raises:
            TesseraError: with a message that names the rule, the place and the remedy.
        """


@dataclass(frozen=True)
class Edge:
    """One `Input` field of a validated config."""

    path: str  # dotted, relative to the stage: "method.neighbors", "images.0.from"
    kinds: tuple[str, ...]
    stage: str  # the name it holds


def edges(config: BaseModel) -> list[Edge]:
    """All `Input` fields of a validated config, nested ones and lists of them included, in field order."""
    found = []
    for path, marks, value in _marked(config, InputKind):
        if isinstance(value, str):
            found.append(Edge(path, tuple(dict.fromkeys(kind for mark in marks for kind in mark.kinds)), value))
    return found


def sources(config: BaseModel) -> dict[str, str]:
    """All `Source` fields that are set: dotted path -> path or address."""
    return {path: value for path, _, value in _marked(config, SourceMark) if isinstance(value, str)}


def open_source(address: str) -> Objects:
    """What lies at the path or address of a `Source` field, for a stage to read; nothing is read yet.

    Picklable. Credentials for a bucket come from the environment of each process, as they do for the store.
    Raises: StoreError for an address of no known kind.
    """
    from pipeline.store.objects import Objects

    return Objects(address)


def unfingerprinted(config: BaseModel) -> list[str]:
    """Dotted paths of the fields that never change the artifact; a path stands for everything below it."""
    return [path for path, _, _ in _marked(config, NoFingerprintMark)]


def stop_points(config: BaseModel) -> dict[str, Any]:
    """Dotted paths of the fields that say how far the stage goes, with their values."""
    return {path: value for path, _, value in _marked(config, StopPointMark)}


def field_name(name: str, info: FieldInfo) -> str:
    """What YAML calls a field: its alias, where a Python keyword (`from`) forced another name on it."""
    return info.alias or name


def arms(annotation: Any, marks: tuple[Any, ...] = ()) -> list[tuple[Any, tuple[Any, ...]]]:
    """The plain types that an annotation allows, each with its marks: `Annotated`, unions and aliases are opened."""
    if isinstance(annotation, TypeAliasType):
        return arms(annotation.__value__, marks)
    if get_origin(annotation) is Annotated:
        return arms(annotation.__origin__, (*marks, *annotation.__metadata__))
    if get_origin(annotation) in (Union, UnionType):
        return [arm for part in get_args(annotation) for arm in arms(part, marks)]
    return [(annotation, marks)]


def _marked(model: BaseModel, mark: type[M], prefix: str = "") -> Iterator[tuple[str, list[M], Any]]:
    for name, info in type(model).model_fields.items():
        path = f"{prefix}{field_name(name, info)}"
        yield from _walk(info.annotation, tuple(info.metadata), getattr(model, name), mark, path)


def _walk(
    annotation: Any, inherited: tuple[Any, ...], value: Any, mark: type[M], path: str
) -> Iterator[tuple[str, list[M], Any]]:
    """Go through value and annotation together, so that a mark applies to what it was put on and to nothing else."""
    allowed = arms(annotation, inherited)
    if mark is NoFingerprintMark and (marks := _of(mark, allowed)):
        yield path, marks, value
        return
    if isinstance(value, BaseModel):
        yield from _marked(value, mark, f"{path}.")
    elif isinstance(value, list | tuple | set | frozenset):
        items, outer = _inside(allowed, mapping=False)
        for i, item in enumerate(value):
            yield from _walk(items, outer, item, mark, f"{path}.{i}")
    elif isinstance(value, dict):
        items, outer = _inside(allowed, mapping=True)
        for key, item in value.items():
            yield from _walk(items, outer, item, mark, f"{path}.{key}")
    elif marks := _of(mark, [arm for arm in allowed if not get_args(arm[0]) or get_origin(arm[0]) is Literal]):
        yield path, marks, value


def _of(mark: type[M], allowed: list[tuple[Any, tuple[Any, ...]]]) -> list[M]:
    return list(dict.fromkeys(found for _, marks in allowed for found in marks if isinstance(found, mark)))


def _inside(allowed: list[tuple[Any, tuple[Any, ...]]], *, mapping: bool) -> tuple[Any, tuple[Any, ...]]:
    """The annotation of a container's items, and the marks of the container as a whole."""
    parts: list[Any] = []
    outer: list[Any] = []
    for annotation, marks in allowed:
        origin, arguments = get_origin(annotation), get_args(annotation)
        if not isinstance(origin, type) or issubclass(origin, Mapping) is not mapping:
            continue
        parts += arguments[-1:] if mapping else [part for part in arguments if part is not Ellipsis]
        outer += marks
    return (Union[tuple(parts)] if parts else Any), tuple(outer)  # noqa: UP007 - built at run time
