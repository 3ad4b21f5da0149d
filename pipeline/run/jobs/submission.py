"""One submission: a pipeline made ready for another machine, its package, and the command that runs it there."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from pipeline.config.load import Pipeline
from pipeline.errors import ClusterError, UsageError
from pipeline.run.jobs.elsewhere import check_same, local_paths, pipeline_text
from pipeline.run.jobs.package import Package, make_package
from pipeline.stage import DRIVER_CPUS
from pipeline.sweep.space import SpaceFile

if TYPE_CHECKING:
    from pipeline.run.jobs.client import Job, Jobs

START = "start_tessera.py"
SPACE = "space.yaml"
OTHER_PYTHON = "python3"  # on a node where the submitter's own Python does not exist


@dataclass(frozen=True)
class Submission:
    """What will be sent, and how it is started."""

    pipeline: Pipeline
    text: str  # of the pipeline file
    package: Package
    options: Sequence[str]  # of `tessera run` on the cluster
    cpus: float  # reserved for the driver
    environment: Mapping[str, str] = field(repr=False)
    python: str | None = None
    command: Sequence[str] = ("run",)  # of `tessera`; its options come after the pipeline file

    @property
    def file(self) -> str:
        """The pipeline file's name in the package."""
        return file_of(self.pipeline)

    @property
    def entrypoint(self) -> str:
        """The shell command of the job."""
        arguments = shlex.join([START, *self.command, self.file, *self.options])
        if self.python is not None:
            return f"exec {shlex.quote(self.python)} {arguments}"
        # The same Python where nodes have the submitter's files (one machine, a shared disk), else the node's own.
        own = shlex.quote(sys.executable)
        return f"if [ -x {own} ]; then exec {own} {arguments}; else exec {OTHER_PYTHON} {arguments}; fi"

    def send(self, jobs: Jobs, name: str | None) -> str:
        """Send the package and start the job. Returns the job's id."""
        job_id = f"{name or self.pipeline.name}-{secrets.token_hex(4)}"
        with tempfile.TemporaryDirectory(prefix="tessera-") as folder:
            self.package.write(Path(folder))
            return jobs.submit(Path(folder), self.entrypoint, job_id, self.pipeline.name, self.cpus, self.environment)


def file_of(pipeline: Pipeline) -> str:
    """What the one file of a pipeline is called in a package."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', pipeline.name)}.yaml"


def make_submission(
    pipeline: Pipeline,
    options: Sequence[str] = (),
    *,
    cpus: float = 1.0,
    environment: Sequence[str] = (),
    exclude: Sequence[str] = (),
    python: str | None = None,
    space: Path | None = None,
) -> Submission:
    """Make a pipeline ready to be sent.

    Args:
        pipeline: as loaded here, with what `--set` and `--store` changed.
        options: of `tessera run`, or `tessera sweep`, on the cluster.
        cpus: to reserve for the driver.
        environment: `NAME=VALUE`, or `NAME` for this process's value.
        exclude: patterns of paths in the package that are not sent.
        python: the interpreter on the cluster.
        space: of a sweep, which is then what the job runs.

    Raises:
        UsageError: a variable is not set, or the package is too large.
        ConfigError: an address of the pipeline holds a secret.
    """
    text, file = pipeline_text(pipeline), file_of(pipeline)
    variables = {**_variables(environment), DRIVER_CPUS: f"{cpus:g}"}
    with tempfile.TemporaryDirectory(prefix="tessera-") as folder:
        check_same(text, Path(folder) / file, pipeline)
    start = Path(__file__).with_name(START).read_text(encoding="utf-8")
    texts, command = {file: text, START: start}, ["run"]
    if space is not None:
        command = ["sweep", f"--space={SPACE}"]
        texts[SPACE] = yaml.safe_dump(SpaceFile(space).plain(), sort_keys=False)
    package = make_package(texts, exclude)
    package.check_size()
    return Submission(pipeline, text, package, options, cpus, variables, python, command)


def check_disks(pipeline: Pipeline, nodes: Collection[str], here: Collection[str]) -> None:
    """Refuse paths of this machine that other nodes would look for on their own disks.

    Args:
        pipeline: as loaded.
        nodes: the IP addresses of the cluster's nodes.
        here: those of this machine.

    Raises:
        UsageError: a node is another machine.
    """
    elsewhere = sorted(node for node in set(nodes) - set(here) if not ip_address(node).is_loopback)
    if elsewhere and (paths := local_paths(pipeline)):
        named = ", ".join(f"{where} ({path})" for where, path in list(paths.items())[:3])
        raise UsageError(
            f"{named}: a folder of this machine, and {len(elsewhere)} of the cluster's {len(nodes)} nodes are other "
            f"machines ({', '.join(elsewhere[:3])}): use an s3://, gs:// or az:// address, or say --shared-disk if all "
            "nodes see this folder under the same path"
        )


def run_until_over(
    submission: Submission,
    jobs: Jobs,
    name: str | None,
    retries: int,
    say: Callable[[str], object],
    job_id: str,
    follow: Callable[[str], object] | None = None,
) -> Job:
    """Wait for a job, and submit it again when its driver or head was lost. What was finished is cached by then.

    Args:
        submission: what was sent.
        jobs: the cluster.
        name: of the jobs.
        retries: how often it is submitted again at most.
        say: told about every new submission.
        job_id: the first job.
        follow: called for every job, to show what it prints until it ends; default: nothing is shown.
    """
    while True:
        if follow is not None:
            with suppress(ClusterError, UsageError):  # the head went away; whether the job did, the next line asks
                follow(job_id)
        job = jobs.wait(job_id)
        if not job.lost or retries == 0:
            return job
        retries -= 1
        job_id = submission.send(jobs, name)
        say(f"{job.id} was lost ({job.message or 'no reason given'}): submitted again as {job_id}, {retries} more left")


def _variables(texts: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, given, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UsageError(f"--env {name}: a variable is NAME or NAME=VALUE")
        if not given and name not in os.environ:
            raise UsageError(f"--env {name}: it is not set here (set it, or say --env {name}=VALUE)")
        found[name] = value if given else os.environ[name]
    return found
