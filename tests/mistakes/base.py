"""One row of the table of users' mistakes, and the folder in which it is made: a pipeline and a few photographs."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.cli.main import main
from tests.conftest import encode, smooth_pixels

PIPELINE = """\
store: store
tracking: null
stages:
  photos: {uses: ingest, source: photos, layout: folder}
  warmup:
    uses: pretrain
    images: photos
    backbone: {name: resnet18, img_size: 64}
    method: {name: simclr, size: 64}
    steps: 4
    batch_size: 16
    resources: {workers: 0}
  emb: {uses: embeddings, images: photos, encoder: warmup}
  nn: {uses: neighbors, embeddings: emb, k: 10}
"""


@dataclass(frozen=True)
class Mistake:
    """What a user does, and what must be answered.

    Args:
        row: of the table, and a letter where a row holds several mistakes.
        what: the mistake, in a few words.
        code: the exit code that is expected; 0 where the mistake is accepted and what is done about it is stated.
        words: each must be in what the command prints, in any case: the rule, the place, the remedy.
        replace: texts of the pipeline file and what stands in their place.
        options: of the command line, after the name of the file.
        command: `plan` and `run` take the file.
        prepare: changes the folder before the command runs.
        seconds: the longest that the whole command may take on a quiet machine.
    """

    row: str
    what: str
    words: Sequence[str]
    code: int = 2
    replace: Sequence[tuple[str, str]] = ()
    options: Sequence[str] = ()
    command: Sequence[str] = ("plan", "p.yaml")
    prepare: Callable[[Path], object] | None = None
    seconds: float = 10.0

    def __str__(self) -> str:
        return f"{self.row} {self.what}".replace(" ", "-")

    def make(self, folder: Path) -> None:
        """The folder of a user who makes the mistake: 32 photographs of two classes, and the pipeline."""
        for number in range(32):
            path = folder / "photos" / ("cat" if number % 2 else "dog") / f"{number:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_photo(number))
        text = PIPELINE
        for old, new in self.replace:
            assert old in text, f"{self}: the pipeline does not hold {old!r}"
            text = text.replace(old, new)
        (folder / "p.yaml").write_text(text)
        if self.prepare is not None:
            self.prepare(folder)

    def commit(self, folder: Path) -> tuple[int, str]:
        """Run the command; the exit code and all that it printed.

        What is refused before anything is started runs in this process, which is quick; all else in one of its own.
        """
        if self.code == 2 or self.command[0] == "plan":
            return _in_this_process([*self.command, *self.options], folder)
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", *self.command, *self.options],
            cwd=folder,
            env=os.environ | {"TESSERA_CACHE": str(folder / "cache"), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout + done.stderr


@cache
def _photo(number: int) -> bytes:
    return encode(smooth_pixels(96, 80, number))


def _in_this_process(arguments: Sequence[str], folder: Path) -> tuple[int, str]:
    shown = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        code = main(arguments)
    return code, shown.getvalue()
