"""The thread that sends a run's journal while the run goes on, so that nothing else ever waits for a server.

A server that fails is tried again at growing intervals, up to a minute. When the run ends, the thread is given time
while records arrive; what does not arrive stays in the journal for the next run with this address, or for
`tessera tracking send`. That run sends it when its own records are through.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

from pipeline.errors import TesseraError
from pipeline.run.tracking.address import anonymous, is_server
from pipeline.run.tracking.delivery import Delivery
from pipeline.run.tracking.journal import READ_BYTES, Journal, leftovers
from pipeline.run.tracking.server import Server

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0  # metrics are sent in batches: a call to a remote server takes milliseconds
RETRY_SECONDS = (1.0, 5.0, 15.0, 30.0, 60.0)  # after the first, second, ... failure in a row
REFUSED_SECONDS = 300.0  # a password does not become right by asking often
END_SECONDS = 20.0  # without any record arriving, at the end of a run
DATABASE_SECONDS = 180.0  # the same for a database file: nobody is away, and a busy machine makes its tables slowly
DATABASE_TRIES = 20  # of a database file that others write too; a second apart
LEFTOVER_SECONDS = 60.0  # for records of earlier runs, at the end of a run
TOLD_SECONDS = 60.0  # a warning at the end repeats what was said so recently only when it was longer ago


class Sender(threading.Thread):
    """Sends one journal of this process, then what earlier runs have left for the same address.

    Args:
        server: where to.
        journal: of this run; None to send only what is left.
        warn: takes a line for the user.
    """

    def __init__(self, server: Server, journal: Journal | None, warn: Callable[[str], None]) -> None:
        super().__init__(name="tessera-tracking", daemon=True)
        self._server, self._journal = server, journal
        self._own = Delivery(journal, server, self._say_rejected) if journal is not None else None
        self._warn = warn
        self._wake, self._progress = threading.Event(), threading.Condition()
        self._failures, self._arrived = 0, 0
        self._most_failures = 1 if is_server(server.uri) else DATABASE_TRIES  # in a row, when the run has ended
        self._told: float | None = None
        self._has_told_rejected = self._is_closing = self._is_drained = False

    def open(self) -> None:
        """Send the first records in the calling thread, before the thread is started.

        Raises:
            Exception: whatever the client raises.
        """
        if self._own is not None:
            self._own.send_some()

    def run(self) -> None:
        """Send until the run has ended and all has arrived, or until its end finds the server away."""
        try:
            self._send()
        finally:
            if self._journal is not None:
                self._journal.close(delete=self._is_drained)

    def _send(self) -> None:
        leftovers_sent = send_leftovers(self._server, self._say_rejected)
        while True:
            closing = self._is_closing  # read before sending: what was written before it is sent
            self._wake.clear()
            try:
                if self._own is not None and (sent := self._own.send_some()):
                    self._note_progress()
                    if sent < READ_BYTES // 2 and not closing:
                        self._wake.wait(FLUSH_SECONDS)  # few: the next ones go together
                    continue
            except Exception as error:
                refused = self._server.failure(error) == "refused"
                self._note_failure(error, closing, refused)
                if closing and (refused or self._failures > self._most_failures):
                    return
                self._wait(REFUSED_SECONDS if refused else RETRY_SECONDS[min(self._failures, len(RETRY_SECONDS)) - 1])
                continue
            self._failures = 0
            self._is_drained = closing
            try:
                if next(leftovers_sent, False):
                    self._arrived += 1
                    continue
            except Exception as error:  # they stay where they are, for the next run
                logger.debug("old records were not sent: %s", self._server.reason(error))
            if closing:
                return
            self._wake.wait(FLUSH_SECONDS)

    def poke(self) -> None:
        """Look for records now: something was written that should not wait for the next batch."""
        if not self._failures:
            self._wake.set()

    def wait_for_run(self, run: str, seconds: float) -> str | None:
        """MLflow's id of one of our runs, waiting for it while the server does not fail; None without one."""
        if self._journal is None:
            return None
        ids, end = self._journal.ids["runs"], time.monotonic() + seconds
        self.poke()
        with self._progress:
            while run not in ids and self.is_alive() and not self._failures and time.monotonic() < end:
                self._progress.wait(0.2)
        return ids.get(run)

    def close(self) -> None:
        """End the thread: all has arrived, or nothing more does."""
        self._is_closing = True
        self._wake.set()
        arrived, since, drained = -1, time.monotonic(), 0.0
        patience = END_SECONDS if is_server(self._server.uri) else DATABASE_SECONDS
        while self.is_alive() and (now := time.monotonic()) - since < patience:
            if self._arrived != arrived:
                arrived, since = self._arrived, now
            drained = drained or (now if self._is_drained else 0.0)
            if drained and now - drained > LEFTOVER_SECONDS:
                break
            self.join(0.1)
        if self.is_alive() and not self._is_drained:
            self._say_away(TimeoutError(f"no answer within {patience:g} s"), True)
        self._warn = _nothing

    def _note_progress(self) -> None:
        self._failures = 0
        self._arrived += 1
        with self._progress:
            self._progress.notify_all()

    def _note_failure(self, error: Exception, closing: bool, refused: bool) -> None:
        self._failures += 1
        with self._progress:
            self._progress.notify_all()
        if refused or self._failures > self._most_failures:
            self._say_away(error, closing)

    def _wait(self, seconds: float) -> None:
        if self._is_closing:
            time.sleep(min(seconds, RETRY_SECONDS[0]))
        end = time.monotonic() + seconds
        while not self._is_closing and (left := end - time.monotonic()) > 0:
            self._wake.wait(left)
            self._wake.clear()

    def _say_away(self, error: Exception, closing: bool) -> None:
        now = time.monotonic()
        if self._told is not None and (not closing or now - self._told < TOLD_SECONDS):
            return
        self._told = now
        if self._journal is None:
            return
        self._warn(
            f"tracking: {self._server.explain(error)}; the run goes on without it, its records are kept in "
            f"{self._journal.folder} and sent by {'this run, ' * (not closing)}the next one or `tessera tracking send`"
        )

    def _say_rejected(self, what: str) -> None:
        if not self._has_told_rejected:
            self._has_told_rejected = True
            self._warn(f"tracking: {what}; it is left out, the results are in the store")


def send_now(uri: str | None) -> int:
    """Send what runs have left on this machine; returns how many runs' records that were.

    Args:
        uri: the tracking address, with the user and the password that it may need; None for every address.

    Raises:
        TesseraError: a server is away or refuses; what was not sent is kept.
    """
    addresses = {anonymous(uri): uri} if uri is not None else {}
    sent = 0
    for journal in leftovers(uri):
        address = journal.about["address"]
        server = Server(addresses.get(address, address))
        try:
            for _ in send_journal(journal, server, logger.warning):
                pass
        except Exception as error:
            raise TesseraError(f"tracking: {server.explain(error)}; its records are kept") from error
        sent += 1
    return sent


def send_leftovers(server: Server, rejected: Callable[[str], None]) -> Iterator[bool]:
    """Send what earlier runs have left for this address; yields after each step whether something arrived.

    Raises:
        Exception: whatever the client raises; the rest stays where it is.
    """
    for journal in leftovers(server.uri):
        yield from send_journal(journal, server, rejected)


def send_journal(journal: Journal, server: Server, rejected: Callable[[str], None]) -> Iterator[bool]:
    """Send all of one journal that a run has left, close its runs where a kill left them open, and give it back."""
    is_sent = False
    try:
        delivery = Delivery(journal, server, rejected, resumed=True)
        while delivery.send_some():
            yield True
        delivery.close_killed()
        is_sent = True
    finally:
        journal.close(delete=is_sent)
    yield True


def _nothing(text: str) -> None:
    pass
