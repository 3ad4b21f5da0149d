"""CoTAP's ranking loss against the row-chunked double loop: `OMP_NUM_THREADS=1 python -m tests.benchmarks.cotap_loss`.

Forward and backward, float32, CPU (or the GPU with --device cuda). The double loop at n = 38416 is timed on the first
rows and scaled, unless --full is given.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from stages.pretrain.methods.cotap.losses.cotap_ranking import cotap_ranking_loss
from tests.benchmarks.results import write_section
from tests.golden.cotap_reference import RowChunked

TAU1, TAU2, ROWS = -0.2, 0.5, 128


def sample(n: int, pairs: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    q = (0.6 + 0.12 * torch.randn(pairs, n, generator=generator)).clamp(0, 1)
    p = (0.7 * q + 0.18 + 0.06 * torch.randn(pairs, n, generator=generator)).clamp(0, 1)
    return p.to(device).requires_grad_(), q.to(device)


def best_ms(run: Callable[[], None], repeats: int, device: str) -> float:
    # With one thread, its own CPU time: a busy machine takes slices out of the long runs, not out of the short ones.
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return 1e3 * min(times)


def fast(n: int, pairs: int, device: str, repeats: int) -> float:
    p, q = sample(n, pairs, device)
    return best_ms(lambda: cotap_ranking_loss(p, q, tau1=TAU1, tau2=TAU2).sum().backward(), repeats, device)


def slow(n: int, device: str, repeats: int, *, full: bool) -> tuple[float, bool]:
    """Milliseconds of one pair's double loop, and whether all rows were timed."""
    (p,), (q,) = sample(n, 1, device)
    if n < 10_000 or full:
        return best_ms(lambda: RowChunked.apply(p, q, TAU1, TAU2, ROWS).backward(), repeats, device), True
    # Rows are independent and alike: time the first ones only, each against all n columns.
    rows = 10 * ROWS
    return best_ms(lambda: RowChunked.apply(p, q, TAU1, TAU2, ROWS, rows).backward(), repeats, device) * n / rows, False


def extra_memory_mib(n: int) -> float:
    """Growth of a fresh process's peak memory during one forward and backward, after a small one warmed it up."""
    code = f"import tests.benchmarks.cotap_loss as b; print(b.peak_growth_mib({n}))"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def peak_growth_mib(n: int) -> float:
    """In this process; Linux only (the kernel's own peak counter is reset first)."""
    fast(64, 1, "cpu", 1)
    p, q = sample(n, 1, "cpu")
    Path("/proc/self/clear_refs").write_text("5")

    def kib(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    before = kib("VmRSS")
    cotap_ranking_loss(p, q).sum().backward()
    return (kib("VmHWM") - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="time every row of the double loop at n = 38416")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the figures into RESULTS.md")
    arguments = parser.parse_args()
    device, repeats = arguments.device, arguments.repeats
    lines = []

    def say(line: str) -> None:
        lines.append(f"- {line}")
        print(line, flush=True)

    say(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, best of {repeats}")
    times = {}
    for n in (2401, 38416):
        times[n] = fast(n, 1, device, repeats)
        loop, whole = slow(n, device, min(repeats, 3), full=arguments.full)
        note = "" if whole else " (scaled from its first rows)"
        say(f"n={n}: {times[n]:.2f} ms; double loop {loop:.1f} ms{note}: {loop / times[n]:.0f} times")
    say(f"time(38416) / time(2401) = {times[38416] / times[2401]:.1f}")
    batch = fast(2401, 32, device, repeats)
    say(f"32 pairs of n=2401: {batch:.1f} ms = {batch / times[2401]:.1f} times one pair")
    if device == "cpu":
        say(f"extra memory at n=38416: {extra_memory_mib(38416):.0f} MiB")
    if arguments.write:
        write_section(
            "CoTAP ranking loss",
            f"OMP_NUM_THREADS=1 python -m tests.benchmarks.cotap_loss --device {device}",
            "\n".join(lines),
        )


if __name__ == "__main__":
    main()
