"""Addresses of clusters and of tracking that lead nowhere, which a run says before it starts anything."""

from __future__ import annotations

from tests.mistakes.base import Mistake

RUN = ("run", "p.yaml")

IN_ADDRESSES = [
    Mistake(
        "37a",
        "an address where no cluster answers",
        ["no Ray cluster answers at 127.0.0.1:9", "check --address"],
        1,
        [("resources: {workers: 0}", "resources: {workers: 1}")],
        ["--address", "127.0.0.1:9"],
        RUN,
        seconds=15,
    ),
    Mistake(
        "37b",
        "the address of a dashboard for that of a cluster",
        ["host:port of its head", "6379"],
        1,
        options=["--address", "http://127.0.0.1:8265"],
        command=RUN,
    ),
    Mistake(
        "42a",
        "tracking in a folder of files",
        ["tracking mlruns", "use sqlite:///PATH or http://"],
        replace=[("tracking: null", "tracking: mlruns")],
        command=RUN,
    ),
    Mistake(
        "42b",
        "tracking that is away where it is required",
        ["p.yaml:2: tracking: http://127.0.0.1:9 is away", "start it, or leave tracking_required out"],
        replace=[("tracking: null", "tracking: http://127.0.0.1:9\ntracking_required: true")],
        command=RUN,
    ),
    Mistake(
        "42c",
        "tracking required and switched off",
        ["p.yaml:3: tracking_required: tracking is null"],
        replace=[("tracking: null", "tracking: null\ntracking_required: true")],
        command=RUN,
    ),
]
