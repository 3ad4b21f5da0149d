"""The space file of a sweep: which settings are tried, how they are drawn, and what decides. Imports nothing heavy.

objective: knn.top1
space:
  stages.cotap.method.weights.sc_patch: {loguniform: [0.1, 10]}
trials: 12
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.config.complaints import add_problems
from pipeline.config.document import Complaints, Key, Node, nearest_path, read
from pipeline.errors import ConfigError, Problem
from pipeline.stage import Settings

KINDS = ("uniform", "loguniform", "choice", "grid")


class Dimension(Settings):
    """The values that one setting may take: exactly one of the four."""

    uniform: tuple[float, float] | None = Field(None, description="[low, high]")
    loguniform: tuple[float, float] | None = Field(None, description="[low, high], both above 0")
    choice: list[Any] | None = Field(None, min_length=1, description="a list; one of it is drawn")
    grid: list[Any] | None = Field(None, min_length=1, description="a list; every value is tried equally often")

    @model_validator(mode="after")
    def _one_of_them(self) -> Dimension:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(KINDS)}, got {' and '.join(given) or 'none'}")
        if self.bounds is not None:
            low, high = self.bounds
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"{given[0]}: [{low:g}, {high:g}] is no range; give [low, high] with low < high")
            if self.loguniform is not None and low <= 0:
                raise ValueError(f"loguniform: {low:g} has no logarithm; begin above 0, or use uniform")
        return self

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Of a range; None for a list."""
        return self.uniform or self.loguniform

    @property
    def values(self) -> list[Any]:
        """Of a list; empty for a range."""
        return self.choice or self.grid or []

    @property
    def examples(self) -> list[Any]:
        """Values that show whether a stage takes what may be drawn: all of a list, three of a range."""
        if self.bounds is None:
            return self.values
        low, high = self.bounds
        between = math.sqrt(low * high) if self.loguniform is not None else low + (high - low) / math.pi
        return [low, between, high]


class Rungs(Settings):
    """When trials are looked at before their end."""

    stage: str | None = Field(
        None, description="the training that is looked at; default: the one that the trials change"
    )
    steps: list[int] = Field(min_length=1, description="steps of that training, rising")


class Seeds(Settings):
    """Seeds that every setting is tried with."""

    values: list[int] = Field(min_length=1, description="the seeds")
    paths: list[str] | None = Field(
        None, min_length=1, description="dotted paths that take the seed; default: `seed` of what the trials train"
    )


class Space(Settings):
    """All of a space file."""

    objective: str = Field(pattern=r"^[^.\s]+\.\S+$", description="stage.metric, such as knn.top1")
    mode: Literal["max", "min"] | None = Field(None, description="default: what the stage says of its metric")
    space: dict[str, Dimension] = Field(min_length=1, description="dotted path -> the values that are tried")
    search: Literal["random", "grid", "optuna"] = "random"
    trials: int | None = Field(None, ge=1, description="settings to try; with search: grid there is no need for it")
    seed: int = Field(0, ge=0, description="of the draws: the same seed draws the same settings")
    seeds: list[int] | Seeds | None = Field(None, description="seeds that every setting is tried with")
    scheduler: Literal["none", "asha", "median"] = "none"
    rungs: list[int] | Rungs | None = Field(None, description="steps of the training at which trials are compared")
    reduction: float = Field(3.0, gt=1, description="asha: about one in so many trials goes on at each rung")
    concurrent: int | None = Field(None, ge=1, description="trials at once; default: what the cluster has room for")

    @model_validator(mode="after")
    def _fits_together(self) -> Space:
        if self.search == "grid":
            ranges = [path for path, dimension in self.space.items() if dimension.bounds is not None]
            if ranges:
                raise ValueError(f"search: grid needs lists, and {ranges[0]} has a range; list values, or use random")
        elif self.trials is None:
            raise ValueError("trials: say how many settings are to be tried")
        if self.search == "optuna" and any(dimension.grid is not None for dimension in self.space.values()):
            raise ValueError(
                "search: optuna draws where it expects the best, not evenly; write choice in place of grid"
            )
        if self.scheduler != "none" and self.rungs is None:
            raise ValueError(f"scheduler: {self.scheduler} compares trials before their end; give rungs: [STEPS, ...]")
        if any(late <= early for early, late in zip([0, *self.rung_steps], self.rung_steps, strict=False)):
            raise ValueError("rungs: give steps that rise, beginning with 1 or more")
        values = self.seeds.values if isinstance(self.seeds, Seeds) else self.seeds
        if values is not None and (not values or len(set(values)) < len(values)):
            raise ValueError("seeds: give different seeds, at least one")
        return self

    @property
    def rung_steps(self) -> list[int]:
        """Steps at which trials are looked at, their end not counted."""
        return (self.rungs.steps if isinstance(self.rungs, Rungs) else self.rungs) or []

    @property
    def combinations(self) -> int:
        """Settings that the `grid` lists make together; with search: grid the `choice` lists too."""
        lists = [d.values for d in self.space.values() if d.grid is not None or self.search == "grid"]
        return math.prod(len(values) for values in lists)

    @property
    def settings_to_try(self) -> int:
        """How many trials the sweep has."""
        return min(self.trials or self.combinations, self.combinations) if self.search == "grid" else self.trials or 1

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it this sweep. More trials, or more at once, are the same sweep continued."""
        return self.model_dump(mode="json", exclude={"trials", "concurrent"}, exclude_none=True)


class SpaceFile:
    """A space file with the places of its values, for errors that are found later."""

    def __init__(self, path: str | Path) -> None:
        """Read and validate a file.

        Raises:
            ConfigError: with every problem of the file.
        """
        self.path = Path(path)
        complaints = Complaints()
        self.document = _read(self.path, complaints)
        if not isinstance(self.document.value, dict):
            complaints.add("", "a space is a mapping with the keys 'objective' and 'space'", place=self.document.place)
        fields = {key: node for key, node in (self.document.value or {}).items() if key != "extends"}
        node = Node(fields, self.document.place)
        if not complaints:
            try:
                self.space = Space.model_validate(node.plain())
            except ValidationError as error:
                add_problems(error, Space, node, (), complaints)
        if complaints:
            raise ConfigError(sorted(dict.fromkeys(complaints), key=lambda problem: problem.line or 0))

    def plain(self) -> dict[str, Any]:
        """The whole space as one mapping, as a file without `extends` would have it."""
        return {key: value for key, value in self.document.plain().items() if key != "extends"}

    def problem(self, path: tuple[Key, ...], rule: str, remedy: str = "") -> Problem:
        """A broken rule that is found after reading, with the line of its value."""
        place = self.document.place_of(path)
        return Problem(".".join(map(str, path)), rule, remedy, place.file, place.line)


def _read(file: Path, complaints: Complaints) -> Node:
    try:
        return read(file, complaints)
    except FileNotFoundError as error:
        problem = Problem("", "there is no such space file", nearest_path(file, "*.y*ml"), str(file))
        raise ConfigError([problem]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("", f"cannot be read: {error}", "a space is UTF-8 YAML", str(file))]) from error
