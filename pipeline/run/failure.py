"""How a stage failed, in the words of somebody who wrote YAML: what was meant, and the setting that it names."""

from __future__ import annotations

import errno
import re
import traceback
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, StageFailed, StoreError, TesseraError
from pipeline.stage import field_name

if TYPE_CHECKING:
    from pipeline.config.load import Pipeline
    from pipeline.run.result import RunResult

# "backbone.checkpoint: ...", or "batch_size, accumulate: ...": the settings that a message is about.
_SETTINGS = re.compile(r"(?P<first>[a-z_]\w*(\.\w+)*)(, [\w., ]+)?: (?P<rest>.+)", re.DOTALL)


class RunFailed(StageFailed):
    """A stage stopped the run. `result` says how far the run came, and `__cause__` is the stage's error."""

    def __init__(self, stage: str, error: str, cause: BaseException, result: RunResult) -> None:
        self.stage, self.result = stage, result
        self.is_bug = on_purpose(cause) is None  # then the user needs the traceback
        super().__init__(f"stage '{stage}' failed: {error}")
        self.__cause__ = cause


class StagesFailed(StageFailed):
    """What `--keep-going` ends with: every stage that failed, and those that were not run because they need one."""

    def __init__(self, failures: list[RunFailed], result: RunResult) -> None:
        self.failures, self.result = failures, result
        skipped = [stage for stage in result.stages if stage.state == "skipped"]
        lines = [str(failure) for failure in failures]
        lines += [f"stage '{stage.planned.name}' not run: {stage.error}" for stage in skipped]
        super().__init__("\n".join(lines))


def stopped_by(error: BaseException) -> BaseException | None:
    """The interrupt behind an error; None when there is none.

    When Ray receives the same Ctrl-C or SIGTERM, cleaning up raises other errors on top of it.
    """
    while (error.__context__ or error.__cause__) is not None:
        error = error.__context__ or error.__cause__  # type: ignore[assignment]
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return error
    return None


def on_purpose(error: BaseException) -> TesseraError | None:
    """The TesseraError that a stage raised, also where Ray has wrapped it; None for a bug.

    A full disk is no bug, wherever it was met: in the store, in a worker's scratch, in a library's temporary file.
    """
    if isinstance(getattr(error, "cause", None), BaseException):  # Ray's wrapper, which has its cause's type too
        return on_purpose(error.cause)  # type: ignore[attr-defined]
    if isinstance(error, TesseraError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"a disk is full: {str(error).splitlines()[0]} (free space, `tessera artifacts gc` lists what can go; or "
            "name a store on another disk with --store, and for temporary files with RAY_TMPDIR and TMPDIR)"
        )
    return on_purpose(error.__cause__) if error.__cause__ is not None else None


def explain(error: BaseException) -> str:
    """What stopped a stage, in one sentence: the error's own message, or the first line of a bug's."""
    if (known := on_purpose(error)) is not None:
        return str(known)
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    return "".join(traceback.format_exception_only(error)).strip().split("\n")[0]


def explain_in(pipeline: Pipeline, stage: str, error: BaseException) -> str:
    """The same, with file, line and dotted path where the message names a setting of the stage.

    The stage's own name in front of it is left out, because the caller says it.
    """
    message, known = explain(error), on_purpose(error)
    if known is None or isinstance(known, ConfigError):  # a ConfigError has its places
        return message
    message = message.removeprefix(f"{stage}: ")
    named = re.match(rf"stages\.{re.escape(stage)}[.:] ?", message)
    found = _SETTINGS.match(message[named.end() :] if named else message)
    config = type(pipeline.stages[stage].stage.config)
    fields = {field_name(*field) for field in config.model_fields.items()}
    if found is not None and found["first"].split(".")[0] in fields:
        path = ["stages", stage, *found["first"].split(".")]
        return str(pipeline.problem(path, found["rest"]))
    return str(pipeline.problem(["stages", stage], message[named.end() :])) if named else message
