"""The bank gives what a search in memory gives, whatever its blocks, and its memory does not grow with it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.evaluate import vector_bank
from stages.evaluate.vector_bank import VectorBank
from stages.evaluate.weighted_knn import nearest

GROWTH = """
import sys, psutil, torch
from pathlib import Path
from stages.evaluate import vector_bank
vector_bank.SIMILARITIES = 4_000_000
bank = vector_bank.VectorBank(Path(sys.argv[1]))
for start in range(0, int(sys.argv[2]), 1000):
    bank.append(torch.nn.functional.normalize(torch.randn(1000, 128), dim=1))
for _ in range(3):
    similarity, rows = bank.nearest(torch.nn.functional.normalize(torch.randn(200, 128), dim=1), 30)
    bank.gather(rows)
print(psutil.Process().memory_full_info().uss)
"""


def bank_of(rows: torch.Tensor, folder: str, parts: int) -> VectorBank:
    bank = VectorBank(Path(folder) / "bank")
    for part in rows.tensor_split(parts):
        bank.append(part)
    return bank


@given(count=st.integers(1, 60), k=st.integers(1, 12), block=st.integers(1, 70), seed=st.integers(0, 9))
def test_any_blocks_find_what_memory_finds(count: int, k: int, block: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-1, 2, (count, 3), generator=generator).float()  # many ties
    queries = torch.randint(-1, 2, (4, 3), generator=generator).float()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(vector_bank, "SIMILARITIES", block * len(queries))
        bank = bank_of(rows, folder, parts=3)
        assert len(bank) == count
        if k > count:
            with pytest.raises(ValueError, match=f"there are {count} vectors"):
                bank.nearest(queries, k)
            return
        similarity, found = bank.nearest(queries, k)
        assert torch.equal(similarity, nearest(rows, queries, k)[0])
        assert torch.equal((queries[:, None] * bank.gather(found)).sum(dim=2), similarity)
        assert all(len(set(row)) == k for row in found.tolist())


def test_ties_are_in_the_order_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_bank, "SIMILARITIES", 2)
    bank = bank_of(torch.ones(5, 1), str(tmp_path), parts=1)
    assert bank.nearest(torch.ones(1, 1), 5)[1].tolist() == [[0, 1, 2, 3, 4]]


def test_memory_is_flat(tmp_path: Path) -> None:
    used = []
    for count in (3_000, 300_000):
        command = [sys.executable, "-c", GROWTH, str(tmp_path / str(count)), str(count)]
        used.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert used[1] - used[0] < 75e6  # the vectors are 154 MB
