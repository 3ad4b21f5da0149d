"""The tables with which commands show their results, on standard output."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.run.display import duration, size
from pipeline.run.tracking import absolute_uri, flatten, how_to_open
from pipeline.store.uses import is_pinned, known_users

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact
    from pipeline.store.garbage import Removed
    from pipeline.store.uses import Verdict

PIPE_WIDTH = 240
PROBLEMS_SHOWN = 20
RANDOM = "_random"  # how the name of an untrained encoder's metric ends
STATE_STYLES = {"cached": "green", "done": "green", "run": "yellow", "failed": "red", "ok": "green", "warn": "yellow"}
STATE_STYLES |= {"fail": "red", "skipped": "red"}


def stdout() -> Console:
    """The console for results. In a pipe, which has no width, long lines are not folded."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of plain strings. Cells that name a state are coloured; long cells are folded and not cut."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(f"[{STATE_STYLES[cell]}]{cell}[/]" if cell in STATE_STYLES else escape(cell) for cell in row))
    stdout().print(table)


def print_plan(plan: dict[str, Any]) -> None:
    """Print a plan's JSON as a table."""
    rows = [
        (stage["name"], stage["uses"], stage["state"], ", ".join(stage["reasons"]), stage["fingerprint"][:12])
        for stage in plan["stages"]
    ]
    print_table(f"plan of {plan['pipeline']}", ("stage", "uses", "state", "why", "fingerprint"), rows)
    waiting = sum(stage["state"] == "run" for stage in plan["stages"])
    print(f"{waiting} to run, {len(rows) - waiting} cached" if waiting else f"all {len(rows)} stages are cached")


def print_results(result: dict[str, Any]) -> None:
    """Print a run's JSON as tables: where every artifact is, then the results."""
    rows = [
        (stage["name"], stage["state"], duration(stage["seconds"]) if stage["seconds"] else "", stage["artifact"] or "")
        for stage in result["stages"]
    ]
    print_table(f"artifacts of {result['pipeline']}", ("stage", "state", "time", "artifact"), rows)
    metrics = [row for stage in result["stages"] for row in result_rows(stage)]
    if metrics:
        print_table("results", ("stage", "metric", "value", "untrained encoder", "difference"), metrics)


def result_rows(stage: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """Table rows of one stage of a run's JSON: one a metric, with that of an untrained encoder where there is one."""
    metrics, units = stage.get("metrics") or {}, stage.get("units") or {}
    for name, value in metrics.items():
        of = name.removesuffix(RANDOM)
        if of != name and of in metrics:
            continue  # it stands beside its metric
        unit, random = f" {units[name]}" if units.get(name) else "", metrics.get(f"{name}{RANDOM}")
        points = " points" if unit == " %" else unit  # a difference of two percentages is no percentage
        figure = partial(number, digits=2 if unit == " %" else 4)
        beside = ("", "") if random is None else (figure(random) + unit, f"{figure(value - random, sign='+')}{points}")
        yield stage["name"], name, figure(value) + unit, *beside


def print_closing(result: dict[str, Any], store: str, tracking: str | None) -> None:
    """Print where the artifacts and the tracked runs are."""
    done = sum(stage["state"] == "done" for stage in result["stages"])
    if not done:
        print(f"all {len(result['stages'])} stages are cached")
    print(f"store: {store}")
    if tracking:
        print(f"runs:  {how_to_open(absolute_uri(tracking))}")


def print_artifacts(rows: Sequence[dict[str, Any]]) -> None:
    """Print what `artifacts ls` has found."""
    cells = [
        (
            r["stage"],
            r["kind"],
            r["fingerprint"][:12],
            str(r["rows"] or ""),
            size(r["bytes"]),
            when(r["created"]),
            r["address"],
        )
        for r in rows
    ]
    print_table(f"{len(cells)} artifacts", ("stage", "kind", "fingerprint", "rows", "size", "made", "address"), cells)


def print_artifact(artifact: Artifact) -> None:
    """Print an artifact's manifest in words."""
    m, say = artifact.manifest, partial(stdout().print, markup=False, soft_wrap=True)
    say(f"{artifact.name}, made by stage '{m.stage}' ({m.uses}, version {m.version})")
    say(f"  at        {artifact.address}")
    say(f"  made      {when(m.created)} in {duration(m.seconds)}" + (f", {git}" if (git := commit(m.git)) else ""))
    for use in known_users(artifact):
        say(f"  used      as {use}, last {when(use.at)}")
    if is_pinned(artifact.objects, artifact.name):
        say("  pinned    `tessera artifacts gc` leaves it alone")
    say(
        f"  holds     {len(m.files)} files, {size(artifact.bytes)}"
        + (f", {artifact.rows} rows" if artifact.rows else "")
    )
    for title, items in (
        ("columns", m.columns),
        ("counts", m.counts),
        ("metrics", {name: number(value) for name, value in m.metrics.items()}),
        ("inputs", m.inputs),
        (
            "sources",
            {path: f"{s['address']} ({s['files']} files, {size(s['bytes'])})" for path, s in m.sources.items()},
        ),
        ("settings", {path: value for path, value in flatten(m.config).items() if value != "null"}),
        ("notes", {key: shortened(value) for key, value in flatten(m.notes).items()}),
    ):
        if items:
            say(f"  {title}")
            for key, value in items.items():
                say(f"    {key}: {value}")
    if m.problems:
        say(f"  problems ({len(m.problems)})")
        for problem in m.problems[:PROBLEMS_SHOWN]:
            say("    " + ": ".join(problem.values()))
        if len(m.problems) > PROBLEMS_SHOWN:
            say(f"    and {len(m.problems) - PROBLEMS_SHOWN} more (--json lists all)")
    if m.tracking:
        run = m.tracking.get("run") or f"with the tag tessera.record = {m.tracking.get('record')}"
        say(f"  tracked   run {run} at {m.tracking.get('uri')}")
    preview = f"{artifact.address}/{artifact.file(m.preview).stored}" if m.preview else "none"
    say(f"  preview   {preview}")


def print_damages(report: dict[str, Any]) -> None:
    """Print what `artifacts verify` has found: a table, or one sentence."""
    for record in report["notes"]:
        print(f"the store's {record['file']} was damaged: {record['reason']}; it is made anew, no artifact needs it")
    if report["damaged"]:
        rows = [(damage["artifact"], damage["file"], damage["reason"]) for damage in report["damaged"]]
        print_table("damaged", ("artifact", "file", "reason"), rows)
        print(
            f"{report['checked']} artifacts read, {len(rows)} files damaged: run the pipeline again to recompute them"
        )
    else:
        print(f"{report['checked']} artifacts read, all in order")


def print_removed(removed: Sequence[Removed], *, dry_run: bool) -> None:
    """Print what `artifacts gc` has removed."""
    artifacts = [row for row in removed if row.artifact is not None]
    rest = [row for row in removed if row.artifact is None]
    done = "would go" if dry_run else "removed"
    if artifacts:
        cells = [(row.path, size(row.bytes), row.made_by, when(row.made), row.reason) for row in artifacts]
        print_table(f"artifacts: {done}", ("artifact", "size", "made by", "made", "why"), cells)
    if rest:
        print_table(f"leftovers: {done}", ("what", "size", "reason"), [(r.path, size(r.bytes), r.reason) for r in rest])
    print(f"{'would free' if dry_run else 'freed'} {size(sum(row.bytes for row in removed))}")


def print_kept(verdict: Verdict) -> None:
    """Print why artifacts stay that the named pipelines do not need."""
    for reason, count in Counter(verdict.kept.values()).items():
        print(f"kept: {count} artifact{'s' if count > 1 else ''}, {reason}")
    if verdict.of_others:
        print(f"({len(verdict.of_others)} of them may be needed by others; --also-others would list them for removal)")


def print_checks(checks: Sequence[dict[str, str]]) -> None:
    """Print what `doctor` has found."""
    rows = [(check["name"], check["state"], check["detail"], check["remedy"]) for check in checks]
    print_table("doctor", ("check", "state", "found", "remedy"), rows)


def when(created: str) -> str:
    """An ISO time of UTC in the user's time zone."""
    return datetime.fromisoformat(created).astimezone().strftime("%Y-%m-%d %H:%M") if created else "at an unknown time"


def commit(git: Any) -> str:
    """A manifest's commit in words."""
    if not isinstance(git, dict):
        return str(git or "")
    return f"commit {str(git.get('commit'))[:12]}" + (" with changes" if git.get("dirty") else "")


def shortened(text: str) -> str:
    """A text, cut off where it is too long for a line."""
    return text if len(text) <= 200 else f"{text[:200]}..."


def number(value: float, digits: int = 4, sign: str = "") -> str:
    """A number with some decimals, or none when it is whole; `sign` "+" shows that of a positive one too."""
    return format(value, f"{sign}.{digits}f" if isinstance(value, float) and not value.is_integer() else f"{sign}g")
