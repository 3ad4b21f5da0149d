"""`python -m pipeline.cli` is the `tessera` command."""

from pipeline.cli.main import main

main()
