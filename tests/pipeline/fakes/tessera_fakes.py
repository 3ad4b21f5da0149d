"""The stages of a user's own package, for the tests: small numbers in place of images.

The folder has entry points of its own, so that putting it on the path is all it takes, as for a user's package.
What a stage did is appended to the file that TESSERA_FAKES_LOG names, and TESSERA_FAKES_HOLD makes `fake_scaled`
wait, once it has begun, for as long as that file exists; before it writes, while one with "-before-writing" behind its
name exists (it then makes one with "-has-read").
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import field_validator

from pipeline.errors import SourceError
from pipeline.run import cluster
from pipeline.share import _SHARE, Share
from pipeline.stage import Context, Feed, Input, NoFingerprint, Outcome, Source, Stage, StageConfig, StopPoint
from pipeline.store.artifact import Artifact

PICTURE = bytes.fromhex(  # one grey pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c6360000000020001"
    "e221bc330000000049454e44ae426082"
)


def log(line: str) -> None:
    if path := os.environ.get("TESSERA_FAKES_LOG"):
        with open(path, "a") as file:
            file.write(line + "\n")


def numbers(context: Context, path: str = "numbers") -> list[float]:
    return json.loads(context.inputs[path].read("numbers.json"))


class NumbersConfig(StageConfig):
    source: Source
    label: Annotated[str, NoFingerprint] = ""


class Numbers(Stage[NumbersConfig]):
    kind, uses_ray, Config = "numbers", False, NumbersConfig

    def run(self, context: Context) -> Outcome:
        log(f"run {context.name}")
        values = [float(line) for line in Path(self.config.source).read_text().split()]
        if not values:
            raise SourceError(f"{self.config.source} holds no number (write one a line)")
        context.output.put_file("numbers.json", json.dumps(values).encode())
        return Outcome(counts={"numbers": len(values)}, problems=[{"key": "line 9", "reason": "not a number"}])


class ScaledConfig(StageConfig):
    numbers: Input["numbers"]
    factor: float = 2.0
    fail: Annotated[str, NoFingerprint] = ""  # "" or the kind of failure


class Scaled(Stage[ScaledConfig]):
    kind, uses_ray, Config = "numbers", False, ScaledConfig

    def run(self, context: Context) -> Outcome:
        print("a library says hello")
        os.system("echo a child says hello")  # ignores Ctrl-C while it lasts, so it comes before the log's line
        log(f"run {context.name}")
        hold = os.environ.get("TESSERA_FAKES_HOLD")
        while hold and Path(hold).exists():
            time.sleep(0.02)
        if self.config.fail == "purpose":
            raise SourceError("the numbers are too odd (take even ones)")
        if self.config.fail == "bug":
            raise ZeroDivisionError("a bug")
        values = [self.config.factor * value for value in numbers(context)]
        if hold and (before_writing := Path(f"{hold}-before-writing")).exists():
            Path(f"{hold}-has-read").touch()
            while before_writing.exists():
                time.sleep(0.02)
        for step, value in enumerate(values):
            context.log_metrics({"loss/term": value}, step)
            context.report_progress(step + 1, len(values), "numbers")
        context.output.put_file("numbers.json", json.dumps(values).encode())
        return Outcome(counts={"numbers": len(values)})


class OnRay(Stage[ScaledConfig]):
    kind, Config = "numbers", ScaledConfig

    def run(self, context: Context) -> Outcome:
        import ray

        log(f"run {context.name}")

        @ray.remote
        def scale(value: float, factor: float, fail: str) -> tuple[float, str]:
            import pipeline.store.store  # what a worker must be able to do

            assert pipeline.store.store.ArtifactStore
            if fail:
                raise SourceError(f"worker says {fail} (do better)")
            return value * factor, os.getcwd()

        tasks = [scale.remote(value, self.config.factor, self.config.fail) for value in numbers(context)]
        done = ray.get(tasks)
        hold = os.environ.get("TESSERA_FAKES_HOLD")
        while hold and Path(hold).exists():
            time.sleep(0.02)
        context.output.put_file("numbers.json", json.dumps([value for value, _ in done]).encode())
        return Outcome(notes={"cwd": done[0][1]})


class MeetingConfig(StageConfig):
    numbers: Input["numbers"]
    tag: str = ""  # makes it another stage than one with the same input
    meets: Annotated[list[str], NoFingerprint] = []  # stages that must have begun, or it waits
    after: Annotated[list[str], NoFingerprint] = []  # stages that must have ended
    fail: Annotated[str, NoFingerprint] = ""
    stuck: Annotated[float, NoFingerprint] = 0.0  # seconds that it waits where no interrupt reaches it


class Meeting(Stage[MeetingConfig]):
    """A stage on Ray as the runner sees it, which needs none: it waits for others, and notes its share."""

    kind, Config = "numbers", MeetingConfig

    def run(self, context: Context) -> Outcome:
        share = _SHARE.get()
        cpus = "all" if share is None else f"{sum(node['CPU'] for node in share.values()):g}"
        log(f"run {context.name}")
        log(f"share {context.name} {cpus}")
        hold = os.environ.get("TESSERA_FAKES_HOLD")
        lines = {f"run {name}" for name in self.config.meets} | {f"end {name}" for name in self.config.after}
        deadline = time.monotonic() + 30
        try:
            time.sleep(self.config.stuck)
            while (hold and Path(hold).exists()) or lines - set(
                Path(os.environ["TESSERA_FAKES_LOG"]).read_text().split("\n")
            ):
                if time.monotonic() > deadline:
                    raise SourceError(f"nobody came: {sorted(lines)} (start them too)")
                time.sleep(0.02)
        except KeyboardInterrupt:
            log(f"interrupted {context.name}")
            raise
        for step in range(3):
            context.log_metrics({"loss": float(step)}, step)
            context.report_progress(step + 1, 3, "numbers")
        log(f"end {context.name}")
        if self.config.fail:
            raise SourceError(f"{context.name} is too odd (take even ones)")
        context.output.put_file("numbers.json", json.dumps(numbers(context)).encode())
        return Outcome(counts={"numbers": 3})


class Greedy(Meeting):
    """The same as a training, which takes the whole cluster."""

    whole_cluster = True


class InDriver(Meeting):
    """The same in the driver's process."""

    uses_ray = False


class FakeCluster(cluster.Cluster):
    """Nodes with so many CPUs each, and no Ray."""

    def there(self) -> Share:
        return {f"node {i}": {"CPU": machine.cpus} for i, machine in enumerate(self.machines)}

    def own_node(self) -> str:
        return "node 0"


def fake_cluster(cpus: str) -> None:
    """In place of a local Ray: "2,1" is a node of two CPUs and one of one."""
    machines = tuple(cluster.Machine(float(count), 0.0) for count in cpus.split(","))
    made = FakeCluster("fake", sum(m.cpus for m in machines), 0.0, len(machines), None, machines)
    cluster.start = lambda address=None: made  # type: ignore[assignment]
    cluster.stop = lambda joined, keep_logs=False: None  # type: ignore[assignment]


if cpus := os.environ.get("TESSERA_FAKES_CPUS"):
    fake_cluster(cpus)


class EncoderConfig(StageConfig):
    numbers: Input["numbers"]
    init: Input["encoder"] | None = None
    width: int = 3
    seed: int = 0


class FakeEncoder(Stage[EncoderConfig]):
    kind, uses_ray, Config = "encoder", False, EncoderConfig
    tracked_as, exports = "model", ("encoder.safetensors", "encoder.json", "*.safetensors")

    def run(self, context: Context) -> Outcome:
        log(f"run {context.name}")
        weights = bytes(int(value) % 256 for value in numbers(context))
        context.output.put_file("encoder.safetensors", weights)
        context.output.put_file("encoder.json", json.dumps({"width": self.config.width}).encode())
        context.output.put_file("preview.png", PICTURE)
        return Outcome(preview="preview.png")


class ScoreConfig(StageConfig):
    of: Input["numbers", "encoder"]
    on: Input["numbers"] | None = None
    scale: float = 1.0
    at_least: Annotated[int, NoFingerprint] = 0  # numbers that it must be given


class Score(Stage[ScoreConfig]):
    kind, uses_ray, Config = "metrics", False, ScoreConfig
    shows_metrics = True

    @classmethod
    def resampled(cls, artifact: Artifact, draws: int, seed: int) -> dict[str, Any]:
        noise = np.random.default_rng(seed).normal(size=draws)
        return {"bytes": artifact.manifest.metrics["bytes"] + noise}

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[tuple[str, str, str]]:
        feed: Feed | None = feeds["of"]
        while feed is not None and feed.counts is None:  # the nearest artifact above that is made
            feed = next(iter(feed.inputs.values()), None)
        found = (feed.counts or {}).get("numbers", self.config.at_least) if feed else self.config.at_least
        if found < self.config.at_least:
            yield "at_least", f"{feed.stage if feed else ''} holds {found} numbers", "lower it"

    def run(self, context: Context) -> Outcome:
        log(f"run {context.name}")
        artifact = context.inputs["of"]
        data = artifact.read("encoder.safetensors" if artifact.kind == "encoder" else "numbers.json")
        metrics = {"bytes": self.config.scale * len(data)}
        context.output.put_file("metrics.json", json.dumps(metrics).encode())
        return Outcome(metrics=metrics)


class TrainingConfig(StageConfig):
    numbers: Input["numbers"]
    weights: dict[str, float] = {}
    seed: int = 0
    steps: int = 90
    stop_at: Annotated[int | None, StopPoint] = None
    fail_above: float | None = None  # of the weight "near"
    seconds: Annotated[float, NoFingerprint] = 0.0

    @field_validator("weights")
    @classmethod
    def _positive(cls, weights: dict[str, float]) -> dict[str, float]:
        if any(weight < 0 for weight in weights.values()):
            raise ValueError("a weight is 0 or more")
        return weights


class Training(Stage[TrainingConfig]):
    """Ends the better the nearer its weight "near" is to 3; a seed adds a hundredth; a step in 90 counts for itself."""

    kind, uses_ray, Config = "encoder", False, TrainingConfig

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[tuple[str, str, str]]:
        known = feeds["numbers"].counts
        if known is not None and self.config.weights.get("numbers", 0) > known["numbers"]:
            yield "weights.numbers", f"there are only {known['numbers']} numbers", "lower it"

    def run(self, context: Context) -> Outcome:
        config = self.config
        near, end = config.weights.get("near", 1.0), config.stop_at or config.steps
        log(f"run {context.name} near={near:g} seed={config.seed} to={end} pid={os.getpid()}")
        hold = os.environ.get("TESSERA_FAKES_HOLD")
        while hold and Path(hold).exists():
            time.sleep(0.02)
        if config.fail_above is not None and near > config.fail_above:
            raise SourceError(f"weights.near: {near:g} is too much (take less)")
        began = context.output.progress_folder / "steps"
        time.sleep(config.seconds * (end - int(began.read_text() if began.exists() else 0)) / config.steps)
        began.write_text(str(end))
        value = (10.0 - (near - 3) ** 2 + 0.01 * config.seed) * end / config.steps
        context.output.put_file("value.json", json.dumps(value).encode())
        return Outcome(metrics={"total": near * value})


class JudgeConfig(StageConfig):
    of: Input["encoder"]


class Judge(Stage[JudgeConfig]):
    kind, uses_ray, Config = "metrics", False, JudgeConfig
    shows_metrics = True
    objectives = {"score": "max", "error": "min"}

    def run(self, context: Context) -> Outcome:
        log(f"run {context.name}")
        value = json.loads(context.inputs["of"].read("value.json"))
        context.output.put_file("metrics.json", json.dumps(value).encode())
        return Outcome(metrics={"score": value, "error": 10 - value})
