"""`tessera run` and `tessera plan`: compute what is not cached, or only say what that would be."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

from pipeline.cli.options import (
    Address,
    Config,
    Force,
    From,
    Json,
    KeepGoing,
    Only,
    Overrides,
    Parallel,
    Store,
    print_json,
    split_names,
)

if TYPE_CHECKING:
    from pipeline.config.load import Pipeline
    from pipeline.plan.plan import Plan
    from pipeline.store.store import ArtifactStore


def run(
    config: Config,
    overrides: Overrides = None,
    only: Only = None,
    from_: From = None,
    force: Force = None,
    store: Store = None,
    address: Address = None,
    keep_going: KeepGoing = False,
    parallel: Parallel = None,
    as_json: Json = False,
) -> None:
    """Compute what is not cached. Stages that do not need each other run at the same time where there is room."""
    from pipeline.cli.printing import print_closing, print_results
    from pipeline.run import runner
    from pipeline.run.display import RunDisplay, results_only_on_stdout
    from pipeline.run.failure import RunFailed, StagesFailed

    pipeline, opened, plan = _planned(config, overrides, only, from_, force, store)
    try:
        with results_only_on_stdout(), RunDisplay() as display:
            result = runner.run(
                pipeline, plan, opened, display, address=address, keep_going=keep_going, parallel=parallel
            )
    except (RunFailed, StagesFailed) as failure:
        if as_json:
            print_json(failure.result.to_json())
        elif isinstance(failure, StagesFailed):
            print_results(failure.result.to_json())
        for one in failure.failures if isinstance(failure, StagesFailed) else [failure]:
            if one.is_bug:
                traceback.print_exception(one.__cause__)
        raise
    if as_json:
        print_json(result.to_json())
    else:
        print_results(result.to_json())
        print_closing(result.to_json(), opened.address, pipeline.tracking)


def plan(
    config: Config,
    overrides: Overrides = None,
    only: Only = None,
    from_: From = None,
    force: Force = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Say which stages are cached, which must run, and why."""
    _, _, made = _planned(config, overrides, only, from_, force, store)
    if as_json:
        print_json(made.to_json())
    else:
        from pipeline.cli.printing import print_plan

        print_plan(made.to_json())


def _planned(
    config: str,
    overrides: list[str] | None,
    only: list[str] | None,
    from_: list[str] | None,
    force: list[str] | None,
    store: str | None,
) -> tuple[Pipeline, ArtifactStore, Plan]:
    """The pipeline of a command's arguments, its store, and the plan of what they select."""
    from pipeline.config.load import load_pipeline

    pipeline = load_pipeline(config, overrides or (), store)
    return (pipeline, *plan_of(pipeline, only, from_, force))


def plan_of(
    pipeline: Pipeline, only: list[str] | None = None, from_: list[str] | None = None, force: list[str] | None = None
) -> tuple[ArtifactStore, Plan]:
    """A pipeline's store, and the plan of what options select; shows sources that have to be read.

    Args:
        pipeline: as loaded.
        only: values of `--only`.
        from_: values of `--from`.
        force: values of `--force`.
    """
    from pipeline.plan.plan import make_plan
    from pipeline.run.display import RunDisplay
    from pipeline.store.store import ArtifactStore

    opened = ArtifactStore(pipeline.store)
    with RunDisplay() as display:
        made = make_plan(
            pipeline,
            opened,
            split_names(only),
            split_names(from_),
            split_names(force),
            lambda source, *progress: display.watch(f"reading {source}", *progress),
        )
    return opened, made
