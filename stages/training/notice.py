"""What a rank may be told about its end while it trains. Imports nothing, so that a launcher can without torch."""

from enum import IntEnum


class Notice(IntEnum):
    """Told to one process; the highest notice of any rank counts for all."""

    NONE = 0
    SAVE = 1  # a machine will be taken away: save now, then go on as long as it is there
    LEAVE = 2  # save now, and stop
