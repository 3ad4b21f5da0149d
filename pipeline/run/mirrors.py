"""Optional mirrors of what MLflow gets: TensorBoard's event files and Weights & Biases, by `mirrors:` in a pipeline.

One page for each executed stage (settings, curves, results, preview) and one for the results of the whole run. No
result depends on them: the first error of a mirror is a warning, and ends it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import UsageError

LOGIN_SECONDS = 20


class Page(Protocol):
    """One stage of a run, in one mirror."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Values of one step."""

    def log_results(self, metrics: Mapping[str, float], picture: bytes | None) -> None:
        """What came out, and the artifact's preview."""

    def finish(self, ok: bool) -> None:
        """The end."""


class TensorBoardPage:
    """A folder with an event file."""

    def __init__(self, folder: str, group: str, name: str, settings: Mapping[str, Any]) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._file = EventFileWriter(str(Path(folder) / group / name))
        self._add(
            0, self._text("settings", f"    {json.dumps(settings, indent=1, default=str)}".replace("\n", "\n    "))
        )

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Scalars."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step, *(Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()))

    def log_results(self, metrics: Mapping[str, float], picture: bytes | None) -> None:
        """Scalars of step 0, and an image."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.log_metrics({f"result/{name}": value for name, value in metrics.items()}, 0)
        if picture is not None:
            from PIL import Image

            width, height = Image.open(io.BytesIO(picture)).size
            image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=picture)
            self._add(0, Summary.Value(tag="preview", image=image))

    def finish(self, ok: bool) -> None:
        """Write what is still in memory."""
        self._file.close()

    def _add(self, step: int, *values: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._file.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    @staticmethod
    def _text(tag: str, text: str) -> Any:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        return Summary.Value(
            tag=f"{tag}/text_summary",
            metadata=metadata,
            tensor=TensorProto(dtype=DT_STRING, string_val=[text.encode()]),
        )


class WandbPage:
    """A run of Weights & Biases, in the group of its pipeline's run."""

    def __init__(self, project: str, group: str, name: str, settings: Mapping[str, Any]) -> None:
        import wandb

        quiet = wandb.Settings(silent=True, console="off", login_timeout=LOGIN_SECONDS, init_timeout=LOGIN_SECONDS)
        folder = os.environ.get("WANDB_DIR", ".tessera")
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=project,
            group=group,
            name=name,
            config=dict(settings),
            dir=folder,
            reinit="create_new",
            settings=quiet,
        )
        # Rows that an interrupted run had logged come after the new ones: W&B's own step may not fall, this one may.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """A row of the run's history."""
        self._run.log({**metrics, "step": step})

    def log_results(self, metrics: Mapping[str, float], picture: bytes | None) -> None:
        """The run's summary, and an image."""
        self._run.summary.update(dict(metrics))
        if picture is not None:
            import wandb
            from PIL import Image

            self._run.log({"preview": wandb.Image(Image.open(io.BytesIO(picture)))})

    def finish(self, ok: bool) -> None:
        """Close the run."""
        self._run.finish(exit_code=0 if ok else 1)


PAGES: dict[str, Callable[[str, str, str, Mapping[str, Any]], Page]] = {
    "tensorboard": TensorBoardPage,
    "wandb": WandbPage,
}


class Mirrors:
    """The mirrors of one pipeline run; stages in several threads may open and use pages at once.

    Args:
        targets: name of a mirror -> folder or project.
        pipeline: its name.
        warn: takes a line for the user.
    """

    def __init__(self, targets: Mapping[str, str], pipeline: str, warn: Callable[[str], None]) -> None:
        self._targets, self.pipeline, self._warn = dict(targets), pipeline, warn
        self._group = f"{pipeline}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"

    def open(self, name: str, settings: Mapping[str, Any]) -> StagePages:
        """A page for a stage in every mirror."""
        pages: dict[str, Page] = {}
        for mirror, target in list(self._targets.items()):
            with self.guarded(mirror):
                pages[mirror] = PAGES[mirror](target, self._group, name, settings)
        return StagePages(self, pages)

    def is_on(self, mirror: str) -> bool:
        """Whether it has not failed yet."""
        return mirror in self._targets

    @contextlib.contextmanager
    def guarded(self, mirror: str) -> Iterator[None]:
        """Calls that may fail: the first failure is a warning, and ends the mirror."""
        try:
            yield
        except Exception as error:
            if self._targets.pop(mirror, None) is None:  # a stage in another thread has found it out, and said so
                return
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._warn(f"mirror {mirror} is away ({reason}); the run goes on without it")


class StagePages:
    """The pages of one stage in all mirrors."""

    def __init__(self, mirrors: Mirrors, pages: Mapping[str, Page]) -> None:
        self._mirrors, self._pages = mirrors, pages

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Values of one step."""
        self._all(lambda page: page.log_metrics(metrics, step))

    def log_results(self, metrics: Mapping[str, float], picture: bytes | None = None) -> None:
        """What came out, and the artifact's preview."""
        self._all(lambda page: page.log_results(metrics, picture))

    def finish(self, ok: bool) -> None:
        """The end."""
        self._all(lambda page: page.finish(ok))

    def _all(self, call: Callable[[Page], None]) -> None:
        for mirror, page in self._pages.items():
            if self._mirrors.is_on(mirror):
                with self._mirrors.guarded(mirror):
                    call(page)


def require_installed(mirrors: Mapping[str, str]) -> None:
    """Check, before anything starts, that the packages of the mirrors are there.

    Raises:
        UsageError: one is not.
    """
    for name in mirrors:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"mirrors.{name}: the package {name} is not installed (uv pip install 'tessera[{name}]')")
