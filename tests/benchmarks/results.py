"""Puts a benchmark's figures into RESULTS.md: one section a benchmark, replaced when it is measured again."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")
_TITLE = "# Benchmarks\n\nEach section says the command that measured it; ratios are taken within one run.\n"


def write_section(title: str, command: str, body: str, path: Path = RESULTS) -> None:
    """Replaces the section `## title`, or appends it; the date, machine and command are written above `body`."""
    today, cpus = datetime.date.today().isoformat(), os.cpu_count()
    section = f"## {title}\n`{command}`, {today}, {cpus} x {platform.machine()} cores\n\n{body.strip()}\n"
    text = path.read_text() if path.exists() else _TITLE
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if old.search(text):
        text = old.sub(lambda _: section + "\n", text)
    else:
        text = f"{text.rstrip()}\n\n{section}"
    path.write_text(text.rstrip() + "\n")
