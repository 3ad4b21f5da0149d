"""Runs the lines that load an exported encoder in a process that sees installed packages and not this project."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ALONE = """
import importlib.util, json, os, sys
sys.path += json.loads(sys.argv[1])
assert all(importlib.util.find_spec(name) is None for name in ("stages", "pipeline")), sys.path
import torch
for folder, snippet, files, out in json.loads(sys.argv[2]):
    os.chdir(folder)
    names = {}
    exec(snippet, names)
    found = [[names[name] for name in ("images", "vector", "feature_map")]]
    with torch.inference_mode():
        for images in map(torch.load, files):
            found.append([images, *names["encoder"](names["encoder"].normalise(images))])
    numbers = {name: getattr(names["encoder"], name) for name in ("width", "vector_width", "stride", "image_size")}
    torch.save({"features": found, "numbers": numbers}, out)
"""


@dataclass(frozen=True)
class Lines:
    """Lines of Python, the folder in which they run, and further images that their encoder is given."""

    folder: Path
    code: str
    images: Sequence[Tensor] = ()  # (B, 3, H, W), RGB in 0..1


def run_alone(jobs: Mapping[str, Lines], scratch: Path) -> dict[str, dict[str, Any]]:
    """What the encoder of each job gave: `features`, a list of (images, vector, map), and its `numbers`."""
    packages = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    arguments = []
    for name, job in jobs.items():
        files = [scratch / f"{name}.{i}.pt" for i in range(len(job.images))]
        for file, images in zip(files, job.images, strict=True):
            torch.save(images, file)
        arguments.append([str(job.folder), job.code, [str(file) for file in files], str(scratch / f"{name}.pt")])
    # -I: neither this folder nor PYTHONPATH; -S: no .pth files, by which an editable install is found.
    command = [sys.executable, "-I", "-S", "-c", ALONE, json.dumps(packages), json.dumps(arguments)]
    subprocess.run(command, cwd="/", check=True, timeout=300)
    return {name: torch.load(scratch / f"{name}.pt") for name in jobs}
