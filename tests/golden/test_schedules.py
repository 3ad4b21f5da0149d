"""Learning rate, weight decay, momentum and teacher temperature against the official schedulers (flsl_schedules)."""

import numpy as np

from stages.training.schedules import cosine, linear_warmup
from tests.golden.golden import load


def test_schedules_equal_the_official_ones() -> None:
    golden = load("flsl_schedules")
    epochs, niter = int(golden["epochs"]), int(golden["niter"])
    total = epochs * niter

    lr = [cosine(t, total, 5e-4 * 2, 1e-6, warmup=3 * niter) for t in range(total)]
    wd = [cosine(t, total, 0.04, 0.4) for t in range(total)]
    momentum = [cosine(t, total, 0.996, 1.0) for t in range(total)]
    temperature = [linear_warmup(epoch, 0.04, 0.07, 10) for epoch in range(epochs)]

    np.testing.assert_allclose(lr, golden["lr"], atol=1e-12)
    np.testing.assert_allclose(wd, golden["wd"], atol=1e-12)
    np.testing.assert_allclose(momentum, golden["momentum"], atol=1e-12)
    np.testing.assert_allclose(temperature, golden["temp_t"], atol=1e-12)
