"""DINO's loss, its gradient and its centre, three steps in a row (dino_loss.npz)."""

import pytest

from stages.pretrain.losses.dino_loss import centred_softmax, dino_loss, moved_center
from tests.golden.golden import assert_close, tensors


@pytest.mark.parametrize("step", [0, 1, 2])
def test_equals_the_official_loss(step: int) -> None:
    golden = tensors("dino_loss")
    batch, prototypes = int(golden["batch"]), int(golden["K"])
    mine = {key.removeprefix(f"s{step}_"): value for key, value in golden.items() if key.startswith(f"s{step}_")}
    student = mine["student"].reshape(-1, batch, prototypes).requires_grad_()
    teacher = mine["teacher"].reshape(-1, batch, prototypes)

    targets = centred_softmax(teacher, mine["center_in"][0], mine["temp"].item())
    loss = dino_loss(student, targets, temperature=golden["student_temp"].item()).mean()
    loss.backward()

    assert_close(loss, mine["loss"], 1e-8)
    assert_close(student.grad.reshape(-1, prototypes), mine["grad_student"], 1e-8)
    center = moved_center(mine["center_in"][0], teacher.mean(dim=(0, 1)), golden["center_momentum"].item())
    assert_close(center, mine["center_out"][0], 1e-8)
