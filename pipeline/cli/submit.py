"""`tessera submit`, `status`, `logs`, `stop`: runs as jobs of a Ray cluster, which go on when the terminal closes."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from pipeline.cli.options import Config, Force, From, Json, Only, Overrides, Parallel, Store, print_json
from pipeline.errors import StageFailed, UsageError

if TYPE_CHECKING:
    from pipeline.config.load import Pipeline
    from pipeline.run.jobs.client import Job
    from pipeline.run.jobs.submission import Submission

Head = Annotated[
    Optional[str],  # noqa: UP045  # typer reads the annotation at run time
    typer.Option("--address", help="http://HOST:8265 of the cluster's head; default RAY_API_SERVER_ADDRESS."),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The id that `submit` printed.", show_default=False)]
Follow = Annotated[bool, typer.Option("--follow", help="Print what the job prints, until it ends.")]


def submit(
    config: Config,
    overrides: Overrides = None,
    only: Only = None,
    from_: From = None,
    force: Force = None,
    store: Store = None,
    address: Head = None,
    parallel: Parallel = None,
    follow: Follow = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, and exit as the run does.")] = False,
    retries: Annotated[
        int, typer.Option("--retries", min=0, help="Submit again when the driver or head was lost; waits.")
    ] = 0,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--name", help="Beginning of the job's id; default: the pipeline's name."),
    ] = None,
    env: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--env", metavar="NAME[=VALUE]", help="A variable for the job. Whoever may see the job can read it."
        ),
    ] = None,
    exclude: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--exclude", metavar="PATTERN", help="Paths in the package that are not sent."),
    ] = None,
    driver_cpus: Annotated[float, typer.Option("--driver-cpus", min=0, help="CPUs reserved for the driver.")] = 1.0,
    python: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--python", help="Python of the cluster's nodes; default: this one, else python3."),
    ] = None,
    shared_disk: Annotated[
        bool, typer.Option("--shared-disk", help="Every node sees this machine's folders under the same paths.")
    ] = False,
    space: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--space", metavar="FILE", help="Run a sweep over this space (see `tessera sweep`)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent; send nothing.")] = False,
) -> None:
    """Run a pipeline, or a sweep of it, as a job of a Ray cluster. The same command again continues it."""
    from pipeline.config.load import load_pipeline
    from pipeline.run.jobs.submission import check_disks, make_submission, run_until_over

    pipeline = load_pipeline(config, overrides or (), store)
    options = [
        f"{option}={name}"
        for option, names in (("--only", only), ("--from", from_), ("--force", force))
        for name in names or ()
    ]
    if parallel is not None:
        options.append(f"--parallel={parallel}")
    if space is not None:
        if options:
            raise UsageError(f"{options[0]} chooses stages of a run, and a sweep runs what its objective needs")
        check_space(pipeline, space)
    made = make_submission(
        pipeline,
        options,
        cpus=driver_cpus,
        environment=env or (),
        exclude=exclude or (),
        python=python,
        space=Path(space) if space is not None else None,
    )
    if dry_run:
        _print_submission(made)
        return
    from pipeline.run.jobs.client import Jobs, local_addresses

    jobs = Jobs(address)
    if not shared_disk:
        check_disks(pipeline, jobs.node_addresses(), local_addresses())
    _say(_summary(made))
    job_id = made.send(jobs, name)
    print(job_id)
    where = f"--address {jobs.address}"
    _say(f"submitted. `tessera logs {job_id} --follow {where}` shows it, `tessera stop {job_id} {where}` stops it")
    if follow or wait or retries:
        show = partial(jobs.follow, write=_write) if follow else None
        job = run_until_over(made, jobs, name, retries, _say, job_id, show)
        _end(job)


def status(
    job: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="[JOB]", help="One job; leave it out for all."),
    ] = None,
    address: Head = None,
    as_json: Json = False,
) -> None:
    """List the runs that were submitted to a cluster."""
    from pipeline.run.jobs.client import Jobs

    jobs = Jobs(address)
    found = [jobs.get(job)] if job else jobs.all()
    if as_json:
        print_json([entry.to_json() for entry in found])
        return
    from pipeline.cli.printing import print_table

    rows = [(entry.id, entry.pipeline, entry.status, _age(entry), entry.message[:120]) for entry in found]
    print_table(f"jobs at {jobs.address}", ("job", "pipeline", "status", "for", "message"), rows)


def logs(job: JobId, address: Head = None, follow: Follow = False) -> None:
    """Print what a submitted run has printed."""
    from pipeline.run.jobs.client import Jobs

    jobs = Jobs(address)
    if follow:
        jobs.follow(job, _write)
    else:
        _write(jobs.logs(job))


def stop(job: JobId, address: Head = None) -> None:
    """Stop a submitted run. What it has finished stays; submitted again, it continues."""
    from pipeline.run.jobs.client import Jobs

    jobs = Jobs(address)
    stopped = jobs.stop(job)
    print(f"{job} is stopping" if stopped else f"{job} has ended already: {jobs.get(job).status.lower()}")


def check_space(pipeline: Pipeline, space: str) -> None:
    """Refuse here what the sweep would refuse there.

    Raises:
        ConfigError: with all that is wrong with the space beside the pipeline.
    """
    from pipeline.sweep.design import make_design
    from pipeline.sweep.space import SpaceFile

    make_design(pipeline, SpaceFile(space))


def _end(job: Job) -> None:
    _say(f"{job.id}: {job.status.lower()}")
    if job.status != "SUCCEEDED":
        raise StageFailed(f"job {job.id} {job.status.lower()}: {job.message} (`tessera logs {job.id}` says why)")


def _summary(made: Submission) -> str:
    from pipeline.run.display import size

    left = (
        f"; not sent, must be installed on the nodes: {', '.join(made.package.left_out)}"
        if made.package.left_out
        else ""
    )
    return f"sending {len(made.package.files)} files of code and config, {size(made.package.bytes)}{left}"


def _print_submission(made: Submission) -> None:
    print(_summary(made).replace("sending", "would send"))
    for file in sorted(made.package.files):
        print(f"  {file}")
    print(f"command: {made.entrypoint}")
    print(f"reserved for the driver: {made.cpus:g} CPU")
    print(f"variables: {', '.join(made.environment)}")
    print(f"{made.file}:")
    print("\n".join(f"  {line}" for line in made.text.rstrip().split("\n")))


def _age(job: Job) -> str:
    from pipeline.run.display import duration

    return duration((job.ended or time.time()) - job.started) if job.started else ""


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr)
