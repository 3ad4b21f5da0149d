"""`tessera compare`: the encoders of a pipeline side by side in all its evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from pipeline.cli.options import Address, Config, Json, KeepGoing, Overrides, Store, print_json

Csv = Annotated[Optional[str], typer.Option("--csv", metavar="FILE", help="Write every cell as a line of CSV.")]  # noqa: UP045
Markdown = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--markdown", metavar="FILE", help="Write the table for a Markdown page."),
]
AllMetrics = Annotated[bool, typer.Option("--all-metrics", help="Every metric of a protocol, not only its main one.")]
Draws = Annotated[int, typer.Option("--draws", min=100, help="Bootstrap samples for the intervals.")]


def compare(
    config: Config,
    overrides: Overrides = None,
    store: Store = None,
    address: Address = None,
    keep_going: KeepGoing = False,
    csv: Csv = None,
    markdown: Markdown = None,
    all_metrics: AllMetrics = False,
    draws: Draws = 2000,
    as_json: Json = False,
) -> None:
    """Compute what is not cached, then show all encoders in all evaluations, with intervals."""
    from pipeline.cli.printing import print_table
    from pipeline.cli.run import plan_of
    from pipeline.compare import render, table
    from pipeline.compare.grouping import group
    from pipeline.config.load import load_pipeline
    from pipeline.run import runner
    from pipeline.run.display import RunDisplay, results_only_on_stdout
    from pipeline.run.failure import StagesFailed

    pipeline = load_pipeline(config, overrides or (), store)
    evaluations = [name for name, entry in pipeline.stages.items() if entry.stage.shows_metrics]
    opened, plan = plan_of(pipeline, from_=evaluations)  # and what they need
    rows, columns = group(pipeline, plan)
    failed: StagesFailed | None = None
    with results_only_on_stdout(), RunDisplay() as display:
        try:
            result = runner.run(pipeline, plan, opened, display, address=address, keep_going=keep_going)
        except StagesFailed as error:
            failed, result = error, error.result
    artifacts = {stage.planned.name: stage.artifact for stage in result.stages if stage.artifact is not None}
    made = table.compare(pipeline, rows, columns, artifacts, draws=draws)
    if markdown is not None:
        Path(markdown).write_text(render.markdown(made, all_metrics=all_metrics), encoding="utf-8")
    if csv is not None:
        Path(csv).write_text(render.as_csv(made), encoding="utf-8")
    if as_json:
        print_json(made.to_json())
    else:
        heads, body = render.lines(made, all_metrics=all_metrics)
        print_table(f"comparison of {pipeline.name}", heads, body)
        print(render.LEGEND)
    if failed is not None:
        raise failed
