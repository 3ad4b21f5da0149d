"""MLflow: what a run tells it, the records of that which are kept on this machine, and how they get to the server.

Imports nothing of `pipeline.run` but its own files and `mirrors`. The names below are what the rest of the tree uses.
"""

from pipeline.run.tracking.address import (
    CREDENTIALS,
    absolute_uri,
    anonymous,
    authorization,
    database_file,
    how_to_open,
    masked,
    probe,
    scrubbed,
)
from pipeline.run.tracking.records import FAILED, FINISHED, KILLED, flatten
from pipeline.run.tracking.server import QUIET, TrackingAway
from pipeline.run.tracking.tracker import StageTracker, Tracker

__all__ = [
    "CREDENTIALS",
    "FAILED",
    "FINISHED",
    "KILLED",
    "QUIET",
    "StageTracker",
    "Tracker",
    "TrackingAway",
    "absolute_uri",
    "anonymous",
    "authorization",
    "database_file",
    "flatten",
    "how_to_open",
    "masked",
    "probe",
    "scrubbed",
]
