"""`tessera lineage`: what an artifact was made from, and what was made from it."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.options import Json, Overrides, Store, config_and_targets, open_catalogue, print_json, store_of
from pipeline.errors import UsageError


def lineage(
    names: Annotated[
        list[str],
        typer.Argument(metavar="ARTIFACT [CONFIG]", help="A stage, kind/fingerprint (or its start), or an address."),
    ],
    overrides: Overrides = None,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Walk back to the sources of an artifact and forward to everything made from it."""
    from pipeline.store.lineage import Graph, tree

    config, targets = config_and_targets(names)
    if len(targets) != 1:
        raise UsageError("lineage takes one artifact or stage, and the pipeline file of the stage")
    catalogue = open_catalogue(config, overrides, store or store_of(targets))
    target = catalogue.one(targets[0])
    graph = Graph.of(catalogue.store.artifacts()).around(target.name)
    if as_json:
        print_json({"target": target.name, **graph.to_json()})
    else:
        from pipeline.cli.printing import stdout

        stdout().print(tree(graph, target.name), soft_wrap=True)
