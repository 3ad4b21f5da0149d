"""`tessera`, with Ray tasks in ingest and neighbors also for few images: `python -m tests.faults.few_on_ray run ...`.

Both take another path for small sets. Here their limits are 1, so that workers can be killed with little to compute.
"""

import sys

from pipeline.cli.main import main
from stages.ingest import stage, write
from stages.neighbors import on_ray

for module in (stage, write, on_ray):
    vars(module)["RAY_FROM"] = 1

if __name__ == "__main__":
    sys.exit(main())
