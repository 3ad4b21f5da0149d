"""Which images keep their labels, and what can be told of scores over their share: intervals, leads, a verdict.

Source: docs/methods.md#label-efficiency.

Shape legend: N test units, R bootstrap samples, D draws of labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stages.data.units import Units, drawn_again

INTERVAL = (2.5, 97.5)  # percentiles

Row = dict[str, Any]
State = Literal["better", "worse", "same"]
WORDS: dict[State, str] = {"better": "better", "worse": "worse", "same": "no difference can be told"}


def draw_images(classes: Sequence[int], fraction: float, seed: tuple[int, int]) -> NDArray[np.int64]:
    """Rows of the images that keep their labels, ascending: the share of each class, but one image of it at least.

    With the same seed a smaller fraction draws some of the images of a larger one.

    Args:
        classes: of the labelled images; images of a segmentation are all of one.
        fraction: in (0, 1].
        seed: of the draw.
    """
    of = np.asarray(classes)
    order = np.random.default_rng(seed).permutation(len(of))
    kept = []
    for one in np.unique(of):
        members = order[of[order] == one]
        kept.append(members[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(kept))


class LabelCurves:
    """Collects the scored test units of every encoder, fraction and draw.

    Args:
        encoders: their names; the first is judged against each of the others.
        fractions: of the labels, ascending.
    """

    def __init__(self, encoders: Sequence[str], fractions: Sequence[float]) -> None:
        self.encoders, self.fractions = list(encoders), list(fractions)
        self.test_images = 0
        self._units: dict[tuple[str, float], list[Units]] = {}
        self._images: dict[float, int] = {}

    def add(self, encoder: str, fraction: float, images: int, units: Units) -> None:
        """The test of one training.

        Args:
            encoder: its name.
            fraction: of the labels.
            images: that kept their labels.
            units: of the test, with one metric (or one confusion matrix) each.
        """
        self._units.setdefault((encoder, fraction), []).append(units)
        self._images[fraction] = images
        self.test_images = len(units.names)

    def rows(self, resamples: int, seed: int) -> list[Row]:
        """A row a point: encoder, fraction, images, score, low, high, spread; lead, lead_low and lead_high.

        `score` is the mean over the draws, `spread` their standard deviation (None with one draw); `lead` is how far
        the first encoder is above this one. Intervals are of 95 %: test units are drawn again, and draws of labels.

        Args:
            resamples: R.
            seed: of the bootstrap.
        """
        found = []
        for fraction in self.fractions:
            scores = {name: self._scores(name, fraction) for name in self.encoders}
            again = {name: self._again(name, fraction, resamples, seed) for name in self.encoders}
            judged = self.encoders[0]
            for name in self.encoders:
                low, high = np.percentile(again[name], INTERVAL)
                row: Row = {
                    "encoder": name,
                    "fraction": fraction,
                    "images": self._images[fraction],
                    "score": float(np.mean(scores[name])),
                    "low": float(low),
                    "high": float(high),
                    "spread": float(np.std(scores[name], ddof=1)) if len(scores[name]) > 1 else None,
                    "lead": None,
                    "lead_low": None,
                    "lead_high": None,
                }
                if name != judged:
                    low, high = np.percentile(again[judged] - again[name], INTERVAL)
                    row |= {"lead": float(np.mean(scores[judged]) - np.mean(scores[name]))}
                    row |= {"lead_low": float(low), "lead_high": float(high)}
                found.append(row)
        order = {name: place for place, name in enumerate(self.encoders)}
        return sorted(found, key=lambda row: (order[row["encoder"]], row["fraction"]))

    def verdicts(self, rows: Sequence[Row]) -> list[str]:
        """A sentence for each encoder but the first."""
        judged = self.encoders[0]
        return [verdict(judged, other, [row for row in rows if row["encoder"] == other]) for other in self.encoders[1:]]

    def _scores(self, encoder: str, fraction: float) -> list[float]:
        return [next(iter(units.metrics().values())) for units in self._units[encoder, fraction]]

    def _again(self, encoder: str, fraction: float, resamples: int, seed: int) -> NDArray[np.float64]:
        """Means over draws that are drawn again too, (R,); the same for every encoder with the same seed."""
        tables = [units.table() for units in self._units[encoder, fraction]]
        scores_DR = np.stack([next(iter(drawn_again(table, resamples, seed).values())) for table in tables])
        draws = len(scores_DR)
        chosen_DR = np.random.default_rng((seed, draws)).integers(0, draws, (draws, resamples))
        means: NDArray[np.float64] = np.take_along_axis(scores_DR, chosen_DR, axis=0).mean(axis=0)
        return means


def verdict(judged: str, other: str, rows: Sequence[Row]) -> str:
    """What the intervals of the lead say, in words.

    Such as "a: better than b from 1 % to 5 % of the labels; no difference can be told at 100 %".

    Args:
        judged: the encoder.
        other: it is compared with.
        rows: of the other encoder, by rising fraction.
    """
    parts: list[str] = []
    for state, group in itertools.groupby(rows, key=_state):
        percents = [f"{100 * row['fraction']:g} %" for row in group]
        place = f"at {percents[0]}" if len(percents) == 1 else f"from {percents[0]} to {percents[-1]}"
        than = f" than {other}" if state != "same" else f" from {other}" if not parts else ""
        labels = " of the labels" if not parts else ""
        parts.append(f"{WORDS[state]}{than} {place}{labels}")
    return f"{judged}: " + "; ".join(parts)


def _state(row: Row) -> State:
    if row["lead_low"] > 0:
        return "better"
    return "worse" if row["lead_high"] < 0 else "same"
