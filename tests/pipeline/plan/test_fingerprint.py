"""A fingerprint covers everything that changes an artifact, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, SerializeAsAny

from pipeline.plan.fingerprint import fingerprint, identity
from pipeline.stage import (
    Context,
    Input,
    NoFingerprint,
    Outcome,
    Resources,
    Settings,
    Source,
    Stage,
    StageConfig,
    StopPoint,
)


class Inner(Settings):
    depth: int = 1
    rate: float = 0.5
    cache: Annotated[bool, NoFingerprint] = False


class Special(Inner):
    extra: str = "x"


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Config(StageConfig):
    images: Input["images"] | list[Input["images"]] = "scenes"
    init: Input["encoder"] | None = None
    source: Source | None = None
    size: int = 20
    clip: float | None = 3.0
    mode: Literal["fast", "quality"] = "fast"
    colour: Colour = Colour.RED
    weights: dict[str, float] = {}
    sizes: list[int] = []
    words: frozenset[str] = frozenset()
    inner: SerializeAsAny[Inner] = Inner()
    log_every: Annotated[int, NoFingerprint] = 10
    stop_at: Annotated[int | None, StopPoint] = None
    folders: Annotated[list[str], NoFingerprint] = Field(default=[])


class Thing(Stage[Config]):
    kind = "thing"
    Config = Config

    def run(self, context: Context) -> Outcome:
        return Outcome()


def of(
    settings: Mapping[str, Any] | None = None,
    *,
    stage_type: type[Stage[Any]] = Thing,
    uses: str = "thing",
    sources: Mapping[str, str] | None = None,
    inputs: Mapping[str, str] | None = None,
) -> str:
    stage = stage_type(stage_type.Config.model_validate(settings or {}))
    return fingerprint(identity(uses, stage, sources or {}, {"images": "f1"} if inputs is None else inputs))


floats = st.floats(allow_nan=False)
fingerprinted = st.fixed_dictionaries(
    {},
    optional={
        "size": st.integers(-5, 5),
        "clip": st.none() | floats,
        "mode": st.sampled_from(["fast", "quality"]),
        "colour": st.sampled_from(["red", "blue"]),
        "weights": st.dictionaries(st.text(max_size=3), floats, max_size=3),
        "sizes": st.lists(st.integers(0, 3), max_size=3),
        "words": st.frozensets(st.text(max_size=2), max_size=3),
        "inner": st.fixed_dictionaries({}, optional={"depth": st.integers(0, 2), "rate": floats}),
    },
)
free = st.fixed_dictionaries(
    {},
    optional={
        "log_every": st.integers(1, 99),
        "folders": st.lists(st.text(max_size=3), max_size=2),
        "resources": st.fixed_dictionaries(
            {}, optional={"cpus": st.floats(0.5, 8), "gpus": st.integers(0, 2), "workers": st.integers(0, 4)}
        ),
    },
)


@given(fingerprinted, fingerprinted)
def test_equal_exactly_when_the_settings_are(one: dict[str, Any], two: dict[str, Any]) -> None:
    same = Config.model_validate(one) == Config.model_validate(two)
    assert (of(one) == of(two)) == same


@given(fingerprinted, free)
def test_resources_and_the_like_never_count(settings: dict[str, Any], unfingerprinted: dict[str, Any]) -> None:
    cache = {"inner": {**settings.get("inner", {}), "cache": True}}
    assert of(settings) == of({**settings, **unfingerprinted, **cache})


@given(fingerprinted, st.randoms())
def test_the_order_of_keys_does_not_count(settings: dict[str, Any], random: Any) -> None:
    def shuffled(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        keys = list(value)
        random.shuffle(keys)
        return {key: shuffled(value[key]) for key in keys}

    assert of(settings) == of(shuffled(settings))


@given(fingerprinted)
def test_writing_a_default_out_changes_nothing(settings: dict[str, Any]) -> None:
    written = Config.model_validate(settings).model_dump(mode="python")
    written["colour"] = written["colour"].value
    assert of(settings) == of({**written, "inner": settings.get("inner", {})})


@pytest.mark.parametrize("a", [0.0, 1.0, float("inf"), float("-inf"), None])
def test_infinity_is_not_none(a: float | None) -> None:
    others = [b for b in (0.0, 1.0, float("inf"), float("-inf"), None) if b != a]
    assert of({"clip": a}) not in {of({"clip": b}) for b in others}


def test_a_subclass_in_a_field_counts_with_its_own_fields() -> None:
    plain, special = Config(inner=Special()), Config(inner=Special(extra="y"))
    assert fingerprint(identity("t", Thing(plain), {}, {})) != fingerprint(identity("t", Thing(special), {}, {}))


def test_names_of_stages_do_not_count_but_what_they_made_does() -> None:
    assert of({"images": "a"}) == of({"images": "b"})
    assert of(inputs={"images": "f1"}) != of(inputs={"images": "f2"})
    assert of({"init": "a"}, inputs={"images": "f1", "init": "f2"}) != of({"init": "a"}, inputs={"images": "f1"})
    two = {"images": ["a", "b"]}
    swapped = {"images.0": "f2", "images.1": "f1"}
    assert of(two, inputs={"images.0": "f1", "images.1": "f2"}) != of(two, inputs=swapped)


def test_a_stop_counts_and_having_none_leaves_no_trace() -> None:
    stopped = Thing(Config(stop_at=5))
    assert of({"stop_at": 5}) not in (of(), of({"stop_at": 6}))
    assert "stop_at" not in identity("thing", Thing(Config()), {}, {})["settings"]
    assert fingerprint(identity("thing", stopped, {}, {"images": "f1"}, whole=True)) == of()


def test_where_a_source_lies_does_not_count_but_its_content_does() -> None:
    assert of({"source": "a"}, sources={"source": "d1"}) == of({"source": "b"}, sources={"source": "d1"})
    assert of({"source": "a"}, sources={"source": "d1"}) != of({"source": "a"}, sources={"source": "d2"})


def test_type_version_and_named_packages_count(monkeypatch: pytest.MonkeyPatch) -> None:
    class Newer(Thing):
        version = 2

    class Hanging(Thing):
        packages = ("pydantic",)

    assert len({of(), of(uses="other"), of(stage_type=Newer), of(stage_type=Hanging)}) == 4
    before = of(stage_type=Hanging)
    monkeypatch.setattr("pipeline.plan.fingerprint.version", lambda name: "99.0")
    assert of(stage_type=Hanging) != before


def test_a_named_package_that_is_not_installed() -> None:
    class Missing(Thing):
        packages = ("no-such-package",)

    stage = Missing(Config(resources=Resources()))
    assert identity("t", stage, {}, {})["packages"] == {"no-such-package": "not installed"}


def test_fingerprints_are_the_same_in_every_process() -> None:
    """The order of a set differs between processes (PYTHONHASHSEED); other changes show against the known value."""
    code = (
        "from tests.pipeline.plan.test_fingerprint import of; "
        "print(of({'words': ['a', 'b', 'c', 'd'], 'weights': {'ü': 0.1}, 'clip': 1e-7}))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2", "3")
    }
    assert found == {of({"words": ["d", "c", "b", "a"], "weights": {"ü": 0.1}, "clip": 1e-7})}
    assert all(len(name) == 24 and int(name, 16) >= 0 for name in found)
