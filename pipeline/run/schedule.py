"""Which stage runs when: all whose inputs are there, as many at the same time as there is room for.

The calling thread decides, and gets the signals. A stage that runs alone runs in it; stages that run beside each other
run in threads, each with a share of the cluster. Nobody waits for the artifact of another process and holds a share.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from pipeline import threads
from pipeline.errors import ConfigError, StageFailed, StoreError
from pipeline.run.failure import RunFailed, StagesFailed, explain_in, stopped_by
from pipeline.run.room import Need, Room, need_of
from pipeline.share import DRIVER_CPUS, Share, within
from pipeline.store.owner import this_process
from pipeline.threads import StageThread

if TYPE_CHECKING:
    from pipeline.config.load import Pipeline
    from pipeline.errors import Problem
    from pipeline.run.cluster import Cluster
    from pipeline.run.display import RunDisplay, StageDisplay
    from pipeline.run.execution import Executor
    from pipeline.run.result import RunResult, StageResult
    from pipeline.store.artifact import Artifact
    from pipeline.store.lease import Holder, Lease

STOP_SECONDS = 15.0  # for stages to end after an interrupt: Ray Data needs 2 to 4


@dataclass(eq=False)
class _Work:
    """A stage that is about to run, or runs."""

    result: StageResult
    started: float = field(default_factory=time.monotonic)
    shown: StageDisplay | None = None
    leases: list[Lease] = field(default_factory=list)  # held
    share: Share | None = None
    thread: StageThread | None = None
    error: BaseException | None = None

    @property
    def name(self) -> str:
        return self.result.planned.name

    def release(self) -> None:
        while self.leases:
            self.leases.pop().release()

    def drop(self) -> None:
        """Do without it."""
        self.release()
        if self.shown is not None:
            self.shown.close()


class Schedule:
    """Runs the stages of one run that are not cached.

    Args:
        pipeline: as loaded.
        result: of the run; its stages are in execution order.
        executor: computes a stage.
        display: shows the progress.
        cluster: starts or joins Ray, the first time; only this thread calls it.
        made: called when a stage's artifact is there.
        check: what is wrong with these stages, as far as the artifacts so far show.
        keep_going: when a stage fails, still start the stages that do not need it.
        parallel: stages at once, at most; None: as many as there is room for.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        result: RunResult,
        executor: Executor,
        display: RunDisplay,
        *,
        cluster: Callable[[], Cluster],
        made: Callable[[StageResult], None],
        check: Callable[[set[str]], Sequence[Problem]],
        keep_going: bool = False,
        parallel: int | None = None,
    ) -> None:
        self._pipeline, self._result, self._executor, self._display = pipeline, result, executor, display
        self._start_cluster, self._made, self._check, self._keep_going = cluster, made, check, keep_going
        self._room = Room(parallel)
        self._cluster: Cluster | None = None
        self._ready: list[_Work] = []  # in the order in which their inputs came, then in that of the plan
        self._asking: list[_Work] = []  # another process computes their artifact
        self._running: list[_Work] = []
        self._begun: set[str] = set()
        self._events: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        self._failures: list[RunFailed] = []
        self.left_threads = False  # whether a thread could not be ended after an interrupt

    def run(self) -> None:
        """Until nothing more can run.

        Raises:
            RunFailed: a stage failed; those that ran beside it are finished.
            StagesFailed: several did, or one did with `keep_going`.
            KeyboardInterrupt, SystemExit: the run was interrupted.
        """
        try:
            while self._find_ready() or self._running or self._asking:
                starting = self._admit()
                if len(starting) == len(self._running) == 1 and not self._asking:
                    self._execute(starting[0])
                    self._ended(starting[0])
                    continue
                for work in starting:
                    work.thread = StageThread(work.name, partial(self._in_thread, work))
                    work.thread.start()
                if self._running or self._asking:
                    self._react(self._events.get())
        except BaseException as error:
            stop = stopped_by(error)
            self._stop()
            if stop is not None and stop is not error:
                raise stop from error
            raise
        if len(self._failures) == 1 and not self._keep_going:
            raise self._failures[0]
        if self._failures:
            raise StagesFailed(self._failures, self._result)

    # -- what can start ------------------------------------------------------------------------------------------------
    def _find_ready(self) -> bool:
        """Queue the stages whose inputs are there now, and skip those whose inputs will never be."""
        states = {stage.planned.name: stage for stage in self._result.stages}
        at_work = {work.name for work in self._running}  # one may have its artifact, and not be reported yet
        for result in self._result.stages:
            if result.state != "run" or result.planned.name in self._begun:
                continue
            above = [states[name] for name in result.planned.inputs.values() if name in states]
            lost = [stage.planned.name for stage in above if stage.state in ("failed", "skipped")]
            if lost and self._keep_going:
                result.state, result.error = "skipped", f"it needs {', '.join(map(repr, dict.fromkeys(lost)))}"
            elif not any(stage.artifact is None or stage.planned.name in at_work for stage in above):
                self._begun.add(result.planned.name)
                self._ready.append(_Work(result))
        if self._is_closing:
            for work in self._ready:
                work.drop()
            self._ready = []
        return bool(self._ready)

    def _admit(self) -> list[_Work]:
        """The stages that start now, each with its share."""
        if not self._ready or not self._join():
            return []
        there = self._cluster.there() if self._cluster is not None else {}
        own = self._cluster.own_node() if self._cluster is not None else None
        held = float(os.environ.get(DRIVER_CPUS, 0))
        offer, blocked = self._room.offer(there), False
        starting: list[_Work] = []
        for work in list(self._ready):
            need: Need = need_of(self._pipeline.stages[work.name].stage, there, own, held)
            takes_nothing = need.takes == "asked" and not need.workers  # it may pass one that waits for room
            if offer.lane_is_busy(need) or (blocked and not takes_nothing):
                continue
            if not offer.fits(need):
                blocked = True
            elif self._hold(work):
                self._ready.remove(work)
                self._running.append(work)
                offer.add(work.name, need)
                starting.append(work)
        shares = offer.deal()
        for work in starting:
            work.share = shares[work.name]
        return starting

    def _join(self) -> bool:
        """Start or join Ray for the first stage that needs it. False when nothing can be started now."""
        on_ray = [work for work in self._ready if self._pipeline.stages[work.name].stage.uses_ray]
        for work in on_ray if self._cluster is None else ():
            if self._hold(work):
                try:
                    self._cluster = self._start_cluster()
                    break
                except Exception as error:
                    self._ready.remove(work)
                    self._finish_later(work, error)
                    return False
        return bool(self._ready)

    def _hold(self, work: _Work) -> bool:
        """Take the stage's lease. False when it need not or cannot run now: then it is no longer among the ready."""
        if work.leases:
            return True
        planned = work.result.planned
        if work.shown is None:
            work.started = time.monotonic()
            work.shown = self._display.begin(planned.name, planned.reasons)
        try:
            for lease in self._leases(work):
                if not lease.try_acquire():
                    work.release()
                    self._ask(work)
                    return False
                work.leases.append(lease)
            work.result.artifact = self._executor.adopt(planned)
        except Exception as error:
            self._ready.remove(work)
            self._finish_later(work, error)
            return False
        if work.result.artifact is not None:
            work.result.state = "cached"
            self._ready.remove(work)
            self._finish_later(work)
            return False
        return True

    def _leases(self, work: _Work) -> list[Lease]:
        """A stage that stops early shares its progress with the one that does not, and so its lease."""
        planned = work.result.planned
        names = dict.fromkeys((planned.whole, planned.fingerprint))
        return [self._executor.store.lease(planned.kind, name) for name in names]

    def _finish_later(self, work: _Work, error: BaseException | None = None) -> None:
        work.error = error
        work.release()
        self._running.append(work)
        self._events.put(work)

    # -- another process computes it -----------------------------------------------------------------------------------
    def _ask(self, work: _Work) -> None:
        """Wait in a thread for the process that computes the stage; it has no share meanwhile."""
        self._ready.remove(work)
        self._asking.append(work)
        work.thread = StageThread(work.name, partial(self._wait_for_leases, work))
        work.thread.start()

    def _wait_for_leases(self, work: _Work) -> None:
        def waiting(holder: Holder) -> None:
            assert work.shown is not None
            if holder.owner == this_process():
                work.shown.say("has the same settings as a stage that is computed now: waiting for that one")
            else:
                work.shown.say(f"waiting for {holder}, which computes it already")

        try:
            for lease in self._leases(work):
                lease.acquire(waiting)
                work.leases.append(lease)
        except BaseException as error:
            work.error = error
            work.release()
        self._events.put(work)

    # -- running -------------------------------------------------------------------------------------------------------
    def _execute(self, work: _Work) -> None:
        """Compute the stage in this thread; an interrupt is raised, an error kept."""
        uses_ray = self._pipeline.stages[work.name].stage.uses_ray
        assert work.shown is not None
        try:
            with within(work.share):
                cluster = self._cluster if uses_ray else None
                work.result.artifact = self._executor.compute(work.result.planned, work.shown, cluster)
            work.result.state = "done"
        except Exception as error:
            if (stop := stopped_by(error)) is not None:
                raise stop from error
            work.error = error
        finally:
            work.release()

    def _in_thread(self, work: _Work) -> None:
        try:
            self._execute(work)
        except SystemExit as error:  # what Ray makes of a cluster that is gone
            work.error = StageFailed(f"a library ended it: SystemExit({error}) (look into Ray's logs)")
        except BaseException as error:
            work.error = error
        self._events.put(work)

    def _react(self, work: _Work) -> None:
        """A stage has ended, or the process that computed it has."""
        if work in self._asking:
            self._asking.remove(work)
            if self._is_closing:
                work.drop()
                return
            if work.error is None:
                if (artifact := self._adopted(work)) is not None:
                    work.result.artifact, work.result.state = artifact, "cached"
                    work.release()
                elif work.error is None:
                    self._ready.insert(0, work)
                    return
            self._running.append(work)
        self._ended(work)

    def _adopted(self, work: _Work) -> Artifact | None:
        try:
            return self._executor.adopt(work.result.planned)
        except Exception as error:
            work.release()
            work.error = error
            return None

    def _ended(self, work: _Work) -> None:
        self._running.remove(work)
        self._room.leave(work.name)
        if work.error is not None and not isinstance(work.error, Exception):
            self._running.append(work)  # it is shown as stopped, with the others
            raise work.error
        result = work.result
        result.seconds = time.monotonic() - work.started
        if work.error is not None:
            result.state, result.error = "failed", explain_in(self._pipeline, work.name, work.error)
        self._show_end(work)
        if work.error is not None:
            self._fail(result, work.error)
            return
        self._made(result)
        waiting = {stage.planned.name: stage for stage in self._result.stages if self._is_waiting(stage)}
        problems = self._check(set(waiting))
        for name, stage in waiting.items():
            own = [problem for problem in problems if problem.path.startswith(f"stages.{name}.")]
            if own and (self._keep_going or not self._failures):
                error = ConfigError(own if self._keep_going else list(problems))
                stage.state, stage.error = "failed", explain_in(self._pipeline, name, error)
                self._ready = [ready for ready in self._ready if ready.name != name]
                self._fail(stage, error)

    def _is_waiting(self, stage: StageResult) -> bool:
        at_work = {work.name for work in (*self._running, *self._asking)}
        return stage.state == "run" and stage.planned.name not in at_work

    def _fail(self, result: StageResult, error: Exception) -> None:
        failure = RunFailed(result.planned.name, result.error or "", error, self._result)
        self._failures.append(failure)
        if self._keep_going:
            self._display.warn(f"{failure}")
            return
        for work in self._asking:
            if work.thread is not None:
                work.thread.interrupt()
        if self._running:
            beside = ", ".join(work.name for work in self._running)
            self._display.warn(f"{failure}; the run ends when what runs beside it is done: {beside}")

    @property
    def _is_closing(self) -> bool:
        """Whether nothing new starts, since a stage has failed."""
        return bool(self._failures) and not self._keep_going

    def _show_end(self, work: _Work) -> None:
        assert work.shown is not None
        work.shown.end(*_ending(work.result))

    def _stop(self) -> None:
        """End what runs after an interrupt: as if each stage had got it. A second interrupt does not wait for them."""
        at_work = [*self._running, *self._asking]
        self.left_threads = bool(threads.end([work.thread for work in at_work if work.thread], STOP_SECONDS))
        for work in (*at_work, *self._ready):
            with suppress(StoreError):
                work.release()
            if work.shown is not None and work.result.artifact is None:
                work.result.state = "failed"
                work.result.seconds = time.monotonic() - work.started
                self._show_end(work)


def _ending(result: StageResult) -> tuple[str, str]:
    """The line that closes a stage, and its colour."""
    from pipeline.run.display import duration

    if result.state == "done" and result.artifact is not None:
        counts = ", ".join(f"{count} {name}" for name, count in result.artifact.manifest.counts.items())
        return f"done in {duration(result.seconds)}" + (f" ({counts})" if counts else ""), "green"
    if result.state == "cached":
        return "made by another run meanwhile", "green"
    return ("failed" if result.error else "stopped") + f" after {duration(result.seconds)}", "red"
