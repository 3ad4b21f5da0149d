"""FSDP2 on two ranks under gloo: the training is that of DDP, and a checkpoint of one goes on under the other."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stages.pretrain.methods.method import Method, Step
from stages.training.checkpoint import CheckpointFolder, TrainingState, tensors_of, write_checkpoint
from stages.training.loop import train
from tests.stages.pretrain.methods.ranks import on_two
from tests.stages.training.test_loop import Toy, ToyData, make_training


class Shares(ToyData):
    """A rank's half of every batch."""

    def __init__(self, rank: int) -> None:
        super().__init__(4)
        self.rank = rank

    def batches(self, start: int, stop: int) -> Any:
        for i in range(start, stop):
            batch = next(iter(super().batches(2 * i + self.rank, 2 * i + self.rank + 1)))
            yield batch


class WithTeacher(Toy):
    """Blocks, a teacher that follows, prototypes used outside a forward pass, and a head that one rank may not use."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Flatten(), nn.Linear(192, 16))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(2))
        self.prototypes = nn.Parameter(torch.randn(6, 16))
        self.sometimes = nn.Linear(16, 1)
        self.teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 16)).requires_grad_(False)

    def compute_terms(self, batch: Any) -> dict[str, Tensor]:
        view = batch.views["global"][0]
        features = self.student(view)
        for block in self.blocks:
            features = block(features)
        scores = features @ nn.functional.normalize(self.prototypes, dim=1).T
        terms = {"predict": (features - self.teacher(view)).pow(2).mean(), "scores": scores.logsumexp(1).mean()}
        used = int(batch.image_ids[0]) % 8 < 4  # on rank 0, never on rank 1
        return terms | {"shrink": self.sometimes(features).pow(2).mean() if used else features.sum() * 0}

    def after_step(self, step: Step) -> None:
        with torch.no_grad():
            self.queue += 1
            torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 0.1)
            self.prototypes.copy_(nn.functional.normalize(self.prototypes, dim=1))


class Folder(CheckpointFolder):
    """Checkpoints of which only rank 0 writes; both take part in gathering them."""

    def __init__(self, root: Path, rank: int) -> None:
        super().__init__(root, "f")
        self.rank = rank

    def save(self, method: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
        tensors = tensors_of(method, optimizer)
        if self.rank == 0:
            write_checkpoint(self.root / f"step-{state.step:08d}", tensors, state, "f")
        dist.barrier()


def trained(rank: int, folder: Path, steps: int = 8, **settings: Any) -> dict[str, Any]:
    """The curves and the whole tensors at the end."""
    method: Method = WithTeacher()
    training = make_training(steps, method, watch={"min_rank": 0}, **settings)
    training = type(training)(**{**vars(training), "data": Shares(rank)})
    checkpoints = Folder(folder, rank)
    state = train(training, checkpoints)
    is_split = isinstance(next(method.parameters()), DTensor)
    tensors = torch.load(folder / f"step-{state.step:08d}" / "state.pt", weights_only=True)["method"]
    curve = [[row[name] for name in ("predict", "scores", "shrink", "grad_norm", "rank_image")] for row in state.curves]
    return {"curve": torch.tensor(curve), "split": torch.tensor(is_split), "tensors": tensors}


def both_strategies(rank: int, ranks: int) -> dict[str, Any]:
    """Each kind of optimiser and clipping under both strategies."""
    found: dict[str, Any] = {}
    paths = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(paths)
    root = Path(paths[0])
    for name, clip_mode in (("adamw", "tensor"), ("sgd", "global")):
        optimizer = {"name": name, "lr": 0.01, "clip": 0.5, "clip_mode": clip_mode}
        for strategy in ("ddp", "fsdp2"):
            found[f"{name}/{strategy}"] = trained(
                rank, root / f"{name}-{strategy}", strategy=strategy, optimizer=optimizer
            )
    for first, then in (("ddp", "fsdp2"), ("fsdp2", "ddp")):
        folder = root / f"{first}-then-{then}"
        optimizer = {"name": "adamw", "lr": 0.01, "clip": 0.5}
        trained(rank, folder, strategy=first, optimizer=optimizer, stop_at=4)
        found[f"{first} then {then}"] = trained(rank, folder, strategy=then, optimizer=optimizer)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(root)
    return found


def test_fsdp2_trains_as_ddp_does_and_they_go_on_from_each_other(tmp_path: Path) -> None:
    (found, other) = on_two(both_strategies, tmp_path)
    for name in ("adamw", "sgd"):
        ddp, fsdp = found[f"{name}/ddp"], found[f"{name}/fsdp2"]
        assert (ddp["split"].item(), fsdp["split"].item()) == (False, True)
        assert_alike(fsdp, ddp)
        assert_alike(other[f"{name}/fsdp2"], ddp)
    for name in ("ddp then fsdp2", "fsdp2 then ddp"):
        assert_alike(found[name], found["adamw/ddp"])


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(found["curve"], expected["curve"], rtol=1e-4, atol=1e-5)
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, value in expected["tensors"].items():
        torch.testing.assert_close(found["tensors"][name], value, rtol=1e-4, atol=1e-5, msg=name)
