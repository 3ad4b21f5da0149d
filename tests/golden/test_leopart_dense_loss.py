"""Dense alignment in Leopart's order: Sinkhorn on the whole grid, then RoIAlign (leopart_dense_loss.npz)."""

import torch

from stages.pretrain.losses.dense_alignment import dense_alignment_loss
from stages.pretrain.losses.roi_align import roi_align
from stages.pretrain.losses.sinkhorn import sinkhorn
from tests.golden.golden import assert_close, tensors


def test_loss_and_gradients_equal_leopart() -> None:
    golden = tensors("leopart_dense_loss")
    batch, n_global, patch = int(golden["bs"]), int(golden["n_global"]), int(golden["patch"])
    crops = n_global + int(golden["n_local"])
    grid_g, grid_l = int(golden["grid_g"]), int(golden["grid_l"])
    scores_gc = golden["student_scores_gc"].requires_grad_()
    scores_lc = golden["student_scores_lc"].requires_grad_()

    def maps(scores: torch.Tensor, grid: int) -> torch.Tensor:  # -> (crops, B, K, grid, grid)
        return scores.reshape(-1, batch, grid, grid, scores.shape[-1]).permute(0, 1, 4, 2, 3)

    student = [*maps(scores_gc, grid_g), *maps(scores_lc, grid_l)]
    teacher = golden["teacher_scores_gc"].reshape(n_global, -1, scores_gc.shape[-1])
    losses = []
    for target_crop in range(n_global):
        q = sinkhorn(teacher[target_crop], epsilon=golden["epsilon"].item(), iterations=int(golden["iters"]))
        q_BKhw = maps(q, grid_g)[0]
        for crop in range(crops):
            if crop == target_crop:
                continue
            targets = roi_align(q_BKhw, golden["boxes_gc"][:, target_crop, crop] / patch)
            aligned = roi_align(student[crop], golden["boxes_all"][:, crop, target_crop] / patch)
            losses.append(dense_alignment_loss(aligned, targets, temperature=golden["temperature"].item()))
    loss = torch.stack(losses).mean()
    loss.backward()

    assert_close(loss, golden["loss"], 1e-5)
    assert_close(scores_gc.grad, golden["grad_gc"], 1e-5)
    assert_close(scores_lc.grad, golden["grad_lc"], 1e-5)
