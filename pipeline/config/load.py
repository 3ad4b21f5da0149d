"""Loads a pipeline file: from YAML with `extends` and `--set` to validated stages in the order in which they run.

Every rule that a file breaks is reported at once, with file, line and dotted path. No store is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config import registry
from pipeline.config.complaints import add_problems
from pipeline.config.document import Complaints, Key, Node, Place, nearest, nearest_path, override, read
from pipeline.config.repeat import KEY, repeated
from pipeline.errors import ConfigError, Problem, UsageError
from pipeline.stage import Edge, Stage, edges, sources

DEFAULT_STORE = ".tessera/store"
DEFAULT_TRACKING = "sqlite:///.tessera/mlflow.db"
TOP_LEVEL = ("name", "description", "extends", "store", "tracking", "tracking_required", "mirrors", KEY, "stages")
MIRRORS = ("tensorboard", "wandb")  # pipeline/run/mirrors.py
STAGE_NAME = re.compile(r"[a-z0-9_-]+")


@dataclass(frozen=True)
class PipelineStage:
    """A stage of a pipeline: its name there, its type, and its validated config inside `stage`."""

    name: str
    uses: str  # the entry point's name
    stage: Stage[Any]
    kind: str
    edges: tuple[Edge, ...]
    sources: Mapping[str, str]  # dotted field path -> path or address, as written (relative to the working folder)

    @property
    def inputs(self) -> dict[str, str]:
        """Dotted field path -> name of the stage that feeds it."""
        return {edge.path: edge.stage for edge in self.edges}


@dataclass(frozen=True)
class Pipeline:
    """A validated pipeline; `stages` is in topological order, in the file's order where there is a choice."""

    name: str
    file: Path
    store: str
    tracking: str | None  # None (`tracking: null`): this pipeline is not tracked
    stages: dict[str, PipelineStage]
    description: str = ""
    mirrors: Mapping[str, str] = field(default_factory=dict)  # name -> folder or project
    tracking_required: bool = False  # do not start a run that cannot be tracked
    document: Node = field(repr=False, default=Node({}, Place("")))

    def plain(self) -> dict[str, Any]:
        """The whole pipeline as one mapping, as a file without `extends` and overrides would have it."""
        return {key: value for key, value in self.document.plain().items() if key != "extends"}

    def problem(self, path: Sequence[Key] | str, rule: str, remedy: str = "") -> Problem:
        """A broken rule that is found after loading (a missing source), with the file and line of its value."""
        keys = path.split(".") if isinstance(path, str) else path
        place = self.document.place_of(keys)
        return Problem(".".join(map(str, keys)), rule, remedy, place.file, place.line)


def load_pipeline(
    path: str | Path,
    overrides: Sequence[str] = (),
    store: str | None = None,
    *,
    stage_types: Mapping[str, type[Stage[Any]]] | None = None,
) -> Pipeline:
    """Read and validate a pipeline file.

    Args:
        path: of the file.
        overrides: `a.b.c=value`, as after `--set`.
        store: takes the place of the file's.
        stage_types: take the place of the installed ones.

    Raises:
        ConfigError: with every problem of the file.
    """
    file = Path(path)
    complaints = Complaints()
    return _built(_read(file, complaints), overrides, file, store, complaints, stage_types)


def with_overrides(pipeline: Pipeline, overrides: Sequence[str]) -> Pipeline:
    """The same pipeline with further overrides, as after `--set`; no file is read.

    Raises:
        ConfigError: with every problem of it.
    """
    return _built(pipeline.document, overrides, pipeline.file, pipeline.store, Complaints(), None)


def _built(
    root: Node,
    overrides: Sequence[str],
    file: Path,
    store: str | None,
    complaints: Complaints,
    stage_types: Mapping[str, type[Stage[Any]]] | None,
) -> Pipeline:
    # Of repeated stages, `--set` may change the one that is written, or one of its copies.
    copied = [text for text in overrides if _of_a_copy(root, text)]
    for text in overrides:
        if text not in copied:
            root = override(root, text, complaints, TOP_LEVEL)
    root = repeated(root, complaints)
    for text in copied:
        root = override(root, text, complaints, TOP_LEVEL)
    if root.value is None and complaints:
        raise ConfigError(complaints)
    if not isinstance(root.value, dict):
        complaints.add("", "a pipeline is a mapping with the key 'stages'", place=Place(str(file)))
        raise ConfigError(complaints)
    for key, node in root.value.items():
        if key not in TOP_LEVEL:
            complaints.add(key, f"unknown key {key!r}", nearest(key, TOP_LEVEL), node.place)
    settings = {key: _text(root, key, complaints) for key in ("name", "description", "store", "tracking")}
    mirrors, required = _mirrors(root, complaints), _flag(root, "tracking_required", complaints)
    types = _Types(stage_types)
    root = _without_removed_stages(root)
    stages = _stages(root, types, complaints, file)
    _check_edges(stages, root, types, complaints)
    if complaints:
        once = dict.fromkeys(complaints)  # a file that two others extend is read twice
        raise ConfigError(sorted(once, key=lambda problem: (problem.file, problem.line or 0)))
    return Pipeline(
        name=settings["name"] or file.stem,
        file=file,
        store=store or settings["store"] or DEFAULT_STORE,
        tracking=settings["tracking"] if root.child("tracking") is not None else DEFAULT_TRACKING,
        stages=_in_order(stages),
        description=settings["description"] or "",
        mirrors=mirrors,
        tracking_required=required,
        document=root,
    )


def _of_a_copy(root: Node, text: str) -> bool:
    path = text.partition("=")[0].strip().split(".")
    stages = root.child("stages")
    return root.child(KEY) is not None and path[0] == "stages" and stages is not None and not stages.child(path[1])


def _read(file: Path, complaints: Complaints) -> Node:
    try:
        return read(file, complaints)
    except FileNotFoundError as error:
        problem = Problem("", "there is no such pipeline file", nearest_path(file, "*.y*ml"), str(file))
        raise ConfigError([problem]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("", f"cannot be read: {error}", "a pipeline is UTF-8 YAML", str(file))]) from error


def _text(root: Node, key: str, complaints: Complaints) -> str | None:
    node = root.child(key)
    if node is None or node.value is None:
        return None
    if not isinstance(node.value, str) or not node.value:
        complaints.add(key, f"must be a word, got {node.plain()!r}", place=node.place)
        return None
    return node.value


def _flag(root: Node, key: str, complaints: Complaints) -> bool:
    node = root.child(key)
    if node is None or node.value is None:
        return False
    if not isinstance(node.value, bool):
        complaints.add(key, f"must be true or false, got {node.plain()!r}", place=node.place)
    return node.value is True


def _mirrors(root: Node, complaints: Complaints) -> dict[str, str]:
    node = root.child("mirrors")
    if node is None or node.value is None:
        return {}
    if not isinstance(node.value, dict):
        remedy = "mirrors: {tensorboard: FOLDER, wandb: PROJECT}"
        complaints.add("mirrors", f"must be a mapping, got {node.plain()!r}", remedy, node.place)
        return {}
    found = {}
    for name, value in node.value.items():
        if name not in MIRRORS:
            complaints.add(("mirrors", name), f"unknown mirror {name!r}", nearest(name, MIRRORS), value.place)
        elif value.value is not None and (not isinstance(value.value, str) or not value.value):
            complaints.add(("mirrors", name), f"must be a folder or a project, got {value.plain()!r}", "", value.place)
        elif value.value is not None:
            found[name] = value.value
    return found


class _Types:
    """Stage types by name, from the entry points or from the caller."""

    def __init__(self, given: Mapping[str, type[Stage[Any]]] | None) -> None:
        self.given = given

    def names(self) -> list[str]:
        return sorted(self.given) if self.given is not None else registry.names(registry.STAGES)

    def load(self, name: str) -> type[Stage[Any]]:
        """A stage type.

        Raises:
            UsageError: it cannot be imported.
        """
        found: type[Stage[Any]] = self.given[name] if self.given is not None else registry.load(registry.STAGES, name)
        return found

    def kind(self, node: Node) -> str | None:
        """The kind a stage would have, also when its config is broken; None if its type is unknown."""
        uses = node.child("uses")
        if uses is None or uses.value not in self.names():
            return None
        try:
            return self.load(uses.value).kind
        except UsageError:
            return None


def _without_removed_stages(root: Node) -> Node:
    stages = root.child("stages")
    if stages is None or not isinstance(stages.value, dict):
        return root
    kept = {name: node for name, node in stages.value.items() if not (node.value is None and node.removes)}
    return Node({**root.value, "stages": Node(kept, stages.place)}, root.place)


def _stages(root: Node, types: _Types, complaints: Complaints, file: Path) -> dict[str, PipelineStage]:
    """The stages that could be validated; what is wrong with the others goes to `complaints`."""
    stages = root.child("stages")
    if stages is None or not isinstance(stages.value, dict) or not stages.value:
        rule = "a pipeline needs at least one stage"
        place = stages.place if stages else Place(str(file))
        complaints.add("stages", rule, "stages: {images: {uses: ingest, source: ...}}", place)
        return {}
    found = {}
    for name, node in stages.value.items():
        if not STAGE_NAME.fullmatch(name):
            rule = f"{name!r} is no stage name"
            complaints.add(("stages", name), rule, "use a-z, 0-9, _ and -", node.place)
        if stage := _stage(name, node, types, complaints):
            found[name] = stage
    return found


def _stage(name: str, node: Node, types: _Types, complaints: Complaints) -> PipelineStage | None:
    path = ("stages", name)
    if not isinstance(node.value, dict):
        got = "nothing" if node.value is None else repr(node.plain())
        complaints.add(path, f"a stage is a mapping with the key 'uses', got {got}", place=node.place)
        return None
    uses = node.child("uses")
    if uses is None or not isinstance(uses.value, str):
        remedy = f"name its type: one of {', '.join(types.names())}"
        complaints.add(path, "'uses' is missing" if uses is None else "'uses' must be a word", remedy, node.place)
        return None
    if uses.value not in types.names():
        rule = f"no stage type is called {uses.value!r}"
        complaints.add((*path, "uses"), rule, nearest(uses.value, types.names()), uses.place)
        return None
    try:
        stage_type = types.load(uses.value)
    except UsageError as error:
        complaints.add((*path, "uses"), str(error), "install the package that it needs", uses.place)
        return None
    written = Node({key: value for key, value in node.value.items() if key != "uses"}, node.place)
    try:
        config = _validated(stage_type, written)
    except ValidationError as error:
        add_problems(error, stage_type.Config, written, path, complaints)
        return None
    stage = stage_type(config)
    return PipelineStage(name, uses.value, stage, stage_type.kind, tuple(edges(config)), sources(config))


def _validated(stage_type: type[Stage[Any]], node: Node) -> Any:
    """The config. A key is dropped when it was set to null on top of an extended file, and this type has no such key.

    So a file that extends another one can remove a setting that its own method or stage type does not have.
    """
    try:
        return stage_type.Config.model_validate(node.plain())
    except ValidationError as error:
        unknown = [e["loc"] for e in error.errors(include_url=False) if e["type"] == "extra_forbidden"]
        removed = [path for path in unknown if (at := _node_at(node, path)) and at.value is None and at.removes]
        if not removed:
            raise
        for path in removed:
            node = _without(node, path)
        return stage_type.Config.model_validate(node.plain())


def _node_at(node: Node, path: Iterable[Key]) -> Node | None:
    found: Node | None = node
    for key in path:
        found = found.child(key) if found else None
    return found


def _without(node: Node, path: tuple[Key, ...]) -> Node:
    head, rest = path[0], path[1:]
    if isinstance(node.value, list):
        return replace(node, value=[_without(n, rest) if i == head else n for i, n in enumerate(node.value)])
    if not rest:
        return replace(node, value={key: n for key, n in node.value.items() if key != head})
    return replace(node, value={key: _without(n, rest) if key == head else n for key, n in node.value.items()})


def _check_edges(stages: dict[str, PipelineStage], root: Node, types: _Types, complaints: Complaints) -> None:
    """Complain about edges that lead to no stage, to one of the wrong kind, or around in a ring."""
    node = root.child("stages")
    written: dict[str, Node] = node.value if node is not None and isinstance(node.value, dict) else {}
    for stage in stages.values():
        for edge in stage.edges:
            path = ("stages", stage.name, *edge.path.split("."))
            place = root.place_of(path)
            if edge.stage == stage.name:
                complaints.add(path, f"{edge.stage!r} is this stage itself", "name an earlier stage", place)
            elif edge.stage not in written:
                complaints.add(path, f"no stage is called {edge.stage!r}", nearest(edge.stage, written), place)
            else:
                kind = types.kind(written[edge.stage])
                if kind is not None and kind not in edge.kinds:
                    fitting = [name for name, other in written.items() if types.kind(other) in edge.kinds]
                    expected = " or ".join(edge.kinds)
                    rule = f"{edge.stage!r} is a stage of kind {kind}, expected {expected}"
                    remedy = f"name {' or '.join(fitting)}" if fitting else f"add a stage of kind {expected}"
                    complaints.add(path, rule, remedy, place)
    for ring in _rings(stages):
        path = ("stages", ring[0])
        rule = f"stages wait for each other: {' -> '.join([*ring, ring[0]])}"
        complaints.add(path, rule, "remove one of these edges", root.place_of(path))


def _rings(stages: dict[str, PipelineStage]) -> list[list[str]]:
    """Rings of two stages or more, the shortest first.

    Each is in the order in which data would flow, starting with the stage that the file has first. One ring is found
    for every edge that has to go before the stages can be put in order.
    """
    feeders = {name: dict.fromkeys(stage.inputs.values()) for name, stage in stages.items()}
    for name, own in feeders.items():
        own.pop(name, None)  # a stage that reads itself has a complaint of its own
    rings: list[list[str]] = []
    while True:
        try:
            TopologicalSorter(feeders).prepare()
        except CycleError as error:
            ring: list[str] = error.args[1][:-1]  # the last stage repeats the first
            start = min(range(len(ring)), key=lambda i: list(stages).index(ring[i]))
            rings.append(ring[start:] + ring[:start])
            del feeders[rings[-1][1]][rings[-1][0]]
        else:
            return sorted(rings, key=len)


def _in_order(stages: dict[str, PipelineStage]) -> dict[str, PipelineStage]:
    """The stages, each after its inputs, and otherwise in the file's order.

    graphlib orders by depth instead, which would move stages of a file that is in order already.
    """
    ordered: dict[str, PipelineStage] = {}

    def place(stage: PipelineStage) -> None:
        for feeder in stage.inputs.values():
            if feeder not in ordered:
                place(stages[feeder])
        ordered.setdefault(stage.name, stage)

    for stage in stages.values():
        place(stage)
    return ordered
