"""Jobs on a Ray cluster: started, watched and stopped over the HTTP address of the cluster's head.

Wraps Ray's own client for its errors: each becomes one line that says what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ClusterError, UsageError
from pipeline.run import cluster

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
MARK = "tessera"  # metadata key of the jobs that are ours; its value is the pipeline's name
POLL_SECONDS = 1.0
OLDEST_RAY = (2, 60)
AGENT_SECONDS = 60.0  # a head that has just started takes jobs only when its agent is up too
AWAY_SECONDS = 600.0  # how long a head may be away before a waiting submitter gives up


@dataclass(frozen=True)
class Job:
    """One submitted run."""

    id: str
    status: str  # PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED
    pipeline: str
    started: float | None = None  # seconds since the epoch
    ended: float | None = None
    exit_code: int | None = None  # of the driver; None while it runs, or when it was lost
    message: str = ""

    @property
    def over(self) -> bool:
        """Whether it will not go on."""
        return self.status in ENDED

    @property
    def lost(self) -> bool:
        """Whether it failed without a verdict of its own: its driver or its node was killed."""
        return self.status == "FAILED" and self.exit_code not in (1, 2)

    def to_json(self) -> dict[str, Any]:
        """What `tessera status --json` prints for it."""
        return asdict(self)


class Jobs:
    """The job server of one cluster.

    Args:
        address: `http://host:8265`, the dashboard's; RAY_API_SERVER_ADDRESS where it is None.

    Raises:
        UsageError: no address, or one of another form.
        ClusterError: nothing answers there, the token is missing or wrong, or its Ray is too old.
    """

    def __init__(self, address: str | None) -> None:
        self.address = _checked(address or os.environ.get("RAY_API_SERVER_ADDRESS"))
        cluster.prepare_environment()
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address  # Ray prefers its environment to what a caller names
        from ray.job_submission import JobSubmissionClient

        for name in (
            "ray.dashboard.modules.dashboard_sdk",
            "ray.dashboard.modules.job.sdk",
            "ray._private.runtime_env.packaging",
        ):
            logging.getLogger(name).setLevel(logging.WARNING)  # they set their own level when they are imported
        with self._explained():
            self._client: JobSubmissionClient = JobSubmissionClient(self.address)
        found = self._client._server_ray_version or ""  # Ray's client reads it when it connects, for its own check
        if (numbers := re.match(r"(\d+)\.(\d+)", found)) and tuple(map(int, numbers.groups())) < OLDEST_RAY:
            raise ClusterError(
                f"the cluster at {self.address} runs Ray {found}, and Tessera needs "
                f"{'.'.join(map(str, OLDEST_RAY))} or newer: use a newer image on its nodes"
            )

    def submit(
        self, folder: Path, entrypoint: str, job_id: str, pipeline: str, cpus: float, environment: Mapping[str, str]
    ) -> str:
        """Send a folder and start a command in it. Returns the job's id.

        Args:
            folder: the package.
            entrypoint: the shell command.
            job_id: unique on the cluster.
            pipeline: its name.
            cpus: reserved for the driver on the head's or another node.
            environment: variables of the driver and of all workers.
        """
        end = time.monotonic() + AGENT_SECONDS
        while True:
            try:
                with self._explained():
                    return self._client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=job_id,
                        runtime_env={"working_dir": str(folder), "env_vars": dict(environment)},
                        metadata={MARK: pipeline},
                        entrypoint_num_cpus=cpus,
                    )
            except ClusterError as error:
                if "available agent" not in str(error):
                    raise
                if time.monotonic() > end:
                    raise ClusterError(
                        f"the cluster at {self.address} has no agent that starts jobs: its head is still starting, or "
                        "another Ray on the head's machine holds the agent's port (start the head with "
                        "--dashboard-agent-listen-port=0)"
                    ) from error
                time.sleep(POLL_SECONDS)

    def all(self) -> list[Job]:
        """The jobs that Tessera submitted, the newest first."""
        with self._explained():
            found = [_job(details) for details in self._client.list_jobs() if MARK in (details.metadata or {})]
        return sorted(found, key=lambda job: -(job.started or 0))

    def get(self, job_id: str) -> Job:
        """One job.

        Raises:
            UsageError: the cluster has no such job.
        """
        with self._explained(job_id):
            return _job(self._client.get_job_info(job_id))

    def logs(self, job_id: str) -> str:
        """All that a job has printed so far."""
        with self._explained(job_id):
            return self._client.get_job_logs(job_id)

    def follow(self, job_id: str, write: Callable[[str], object]) -> None:
        """Hand on what a job prints, from its beginning, until it has ended."""

        async def tail() -> None:
            async for lines in self._client.tail_job_logs(job_id):
                write(lines)

        while self.get(job_id).status == "PENDING":
            time.sleep(POLL_SECONDS)
        with self._explained(job_id):
            asyncio.run(tail())

    def wait(self, job_id: str, away_seconds: float = AWAY_SECONDS) -> Job:
        """Wait for the end of a job that was submitted, also through a head that is away for a while.

        A job that went with its head is lost.

        Raises:
            ClusterError: the head was away for `away_seconds`.
        """
        heard = time.monotonic()
        while True:
            try:
                job = self.get(job_id)
            except ClusterError:
                if time.monotonic() - heard > away_seconds:
                    raise
            except UsageError:  # a head that was started again knows nothing of the jobs before
                return Job(job_id, "FAILED", "", message="its head was started again without it")
            else:
                heard = time.monotonic()
                if job.over:
                    return job
            time.sleep(POLL_SECONDS)

    def stop(self, job_id: str) -> bool:
        """Ask a job to stop; False when it had ended already."""
        with self._explained(job_id):
            return bool(self._client.stop_job(job_id))

    def node_addresses(self) -> list[str]:
        """The IP addresses of the cluster's living nodes."""
        from ray.util.state import list_nodes

        with self._explained():
            nodes = list_nodes(address=self.address, limit=10_000)
        return [node.node_ip for node in nodes if node.state == "ALIVE"]

    @contextlib.contextmanager
    def _explained(self, job_id: str | None = None) -> Iterator[None]:
        """Raise what Ray's client raises as an error of ours."""
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split())
            if job_id is not None and "does not exist" in text:
                raise UsageError(
                    f"the cluster at {self.address} has no job {job_id} (`tessera status` lists them)"
                ) from None
            if type(error).__name__ == "AuthenticationError" or re.search(r"\b40[13]\b", text):
                has_token = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
                what = "refuses the token" if has_token else "asks for a token"
                raise ClusterError(
                    f"the cluster at {self.address} {what}: set RAY_AUTH_MODE=token, and the cluster's token in "
                    "RAY_AUTH_TOKEN or ~/.ray/auth_token"
                ) from None
            if "Failed to connect" not in text:
                raise ClusterError(f"the job server at {self.address} could not do it: {text[:400]}") from error
            raise ClusterError(
                f"no job server answers at {self.address} (the address is that of the head's dashboard, "
                "http://HOST:8265; `ray start --head --dashboard-host 0.0.0.0` opens it to other machines)"
            ) from error


def local_addresses() -> set[str]:
    """The IP addresses of this machine."""
    import psutil

    return {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}


def _checked(address: str | None) -> str:
    if not address:
        raise UsageError("which cluster? Name its head: --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS")
    if not re.fullmatch(r"https?://[^/\s]+/?", address):
        raise UsageError(
            f"--address {address}: jobs go to the HTTP address of the head's dashboard, http://HOST:8265 "
            "(HOST:6379 is for `tessera run` on a machine of the cluster)"
        )
    return address.rstrip("/")


def _job(details: JobDetails) -> Job:
    return Job(
        id=details.submission_id or details.job_id or "",
        status=str(details.status.value),
        pipeline=(details.metadata or {}).get(MARK, ""),
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
        message=" ".join((details.message or "").split()),
    )
