"""`tessera schema`: what a pipeline file may say, for editors."""

from __future__ import annotations

from pipeline.cli.options import print_json


def schema() -> None:
    """Print the JSON schema of pipeline files, for editors that complete and check them."""
    from pipeline.config.schema import pipeline_schema

    print_json(pipeline_schema())
