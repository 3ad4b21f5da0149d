"""The errors that Tessera raises on purpose. Any other exception that reaches the user is a bug.

    TesseraError                 exit code 1
    ├── UsageError               exit code 2   the command line, or what it names, is wrong
    │   └── ConfigError          exit code 2   a pipeline file breaks a rule: file, line, dotted path, rule, remedy
    ├── StoreError                             the store cannot be reached, read or written
    │   ├── ArtifactMissing                    nothing is committed under that kind and fingerprint
    │   └── ArtifactDamaged                    a file differs from its manifest; names the artifact, the file and why
    ├── SourceError                            a stage's source is missing, empty, or has nothing usable in it
    ├── StageFailed                            a stage stopped; wraps the cause with the stage's name
    └── ClusterError                           Ray cannot be started or joined, or has too little for a stage

A message says which rule was broken, where, and what to do about it.
"""

from __future__ import annotations

from dataclasses import dataclass


class TesseraError(Exception):
    """Base of the tree. Printed without a traceback; `exit_code` is what the process returns."""

    exit_code = 1


class UsageError(TesseraError):
    """The command line asks for something that cannot be done as asked."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One broken rule of a pipeline file."""

    path: str  # dotted path, "stages.cotap.method.neighbors"
    rule: str  # what is wrong: "'embeddings' is a stage of kind embeddings, expected neighbors"
    remedy: str = ""  # what to do: "name a stage that uses neighbors"
    file: str = ""
    line: int | None = None

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: " if self.file and self.line else f"{self.file}: " if self.file else ""
        path = f"{self.path}: " if self.path else ""  # a file that is no YAML at all has no path yet
        return f"{place}{path}{self.rule}" + (f" ({self.remedy})" if self.remedy else "")


class ConfigError(UsageError):
    """A pipeline file breaks one or more rules, all reported at once."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[Problem]]]:
        return type(self), (self.problems,)  # an error is pickled on its way from Ray's workers to the driver


class StoreError(TesseraError):
    """The store cannot be reached, read or written."""


class ArtifactMissing(StoreError):
    """Nothing is committed under that kind and fingerprint."""


class ArtifactDamaged(StoreError):
    """A file of an artifact differs from its manifest."""

    def __init__(self, artifact: str, file: str, reason: str) -> None:
        self.artifact, self.file, self.reason = artifact, file, reason
        super().__init__(
            f"artifact {artifact} is damaged: {file}: {reason} "
            "(run the pipeline again: the stage is recomputed; `tessera artifacts verify` checks the rest)"
        )

    def __reduce__(self) -> tuple[type[ArtifactDamaged], tuple[str, str, str]]:
        return type(self), (self.artifact, self.file, self.reason)


class SourceError(TesseraError):
    """A stage's source is missing, empty, or has nothing usable in it."""


class StageFailed(TesseraError):
    """A stage stopped before its artifact was committed."""


class ClusterError(TesseraError):
    """Ray cannot be started or joined, or has too little for what a stage asks."""
