"""`python -m pipeline.cli` is the `tessera` command."""

import sys

from pipeline.cli.main import main

sys.exit(main())
