"""Which failures of a bucket pass by themselves, and for how long a request is repeated before they are reported.

Servers ask for fewer requests (503), fail (500) and cut connections half-way. obstore could repeat a request by itself,
but then nobody could tell a conditional write that lost against another process from one that succeeded and whose
answer was lost. So every request is repeated here; obstore repeats only the pieces of a large upload.
"""

from __future__ import annotations

import os
import random
import re
import time
from urllib.parse import urlsplit

from pipeline.errors import StoreError

PATIENCE = 120.0  # seconds for which a request is repeated; TESSERA_STORE_PATIENCE is another number
FIRST_PATIENCE = 15.0  # likewise while the server has not answered this process yet: its address may be wrong
_LEAST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds between two tries

_PASSES = re.compile(
    r"status code: (408|429|500|502|503|504)\b"
    r"|SlowDown|ServerBusy|RequestTimeout\b|ConditionalRequestConflict|OperationAborted|NoSuchUpload"
    r"|error sending request|request or response body error|error decoding response body"
    r"|(?i:connection (reset|closed|refused)|timed out|(?<!retry_)timeout|broken pipe|incomplete message)"
)
_NEVER_PASSES = re.compile(r"(?i:scheme is not allowed|BadScheme|invalid certificate)")

_ANSWERED: set[str] = set()  # servers and buckets that have answered this process, and have not gone away since


class Patience:
    """The tries of one request to a bucket."""

    def __init__(self, address: str) -> None:
        self._server = urlsplit(address).netloc if "://" in address else ""
        self._since = time.monotonic()
        self.failures = 0  # tries that failed, and may have done all the same what was asked

    def answered(self) -> None:
        """Note that the server has answered; of a long answer, that some of it has come."""
        _ANSWERED.add(self._server)
        if self.failures:
            self._since, self.failures = time.monotonic(), 0

    def wait_after(self, error: Exception) -> None:
        """Wait before the next try.

        Raises:
            Exception: `error` itself, when it does not pass by itself or has lasted too long.
        """
        if not passes(error):
            raise error
        self.failures += 1
        left = self._limit() - (time.monotonic() - self._since)
        if left <= 0 and self.failures > 1:
            _ANSWERED.discard(self._server)  # what comes next, such as giving leases back, does not wait as long
            raise error
        pause = min(_LONGEST_PAUSE, _LEAST_PAUSE * 2 ** (self.failures - 1)) * random.uniform(0.5, 1.0)
        time.sleep(min(pause, max(left, 0.0)))

    def tried(self) -> str:
        """How often and for how long, for a message; "" when there was one try."""
        seconds = time.monotonic() - self._since
        return f"tried {self.failures} times in {seconds:.0f} s" if self.failures > 1 else ""

    def _limit(self) -> float:
        longest = patience()
        return longest if self._server in _ANSWERED else min(longest, FIRST_PATIENCE)


def passes(error: Exception) -> bool:
    """Whether a failure may be gone when the same is tried again."""
    text = str(error).partition("\n\nDebug source")[0]  # what follows names settings that are called like failures
    return bool(_PASSES.search(text)) and not _NEVER_PASSES.search(text)


def patience() -> float:
    """Seconds for which a request is repeated.

    Raises:
        StoreError: the variable holds no number.
    """
    written = os.environ.get("TESSERA_STORE_PATIENCE", "")
    try:
        return float(written) if written else PATIENCE
    except ValueError:
        raise StoreError(
            f"TESSERA_STORE_PATIENCE={written} is no number of seconds (set it to one, or unset it)"
        ) from None
