"""The `segment_logistic` stage: logistic regression on patches, with their most frequent classes as labels (CAPI).

Source: docs/methods.md#dense-classifiers. `patch_classification.py` has the protocol around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.stage import Context
from stages.evaluate.frozen import Positives
from stages.evaluate.patch_classification import Choice, PatchClassifierConfig, PatchClassifierStage

if TYPE_CHECKING:
    from torch import Tensor

    from stages.evaluate.patch_labels import Patches


class SegmentLogisticConfig(PatchClassifierConfig):
    """The protocol's numbers; defaults are CAPI's but for the tolerance."""

    c: Positives = Field(
        [1e-6, 3.728e-5, 1.389e-3, 5.179e-2, 1.931, 71.97, 2683.0, 1e5],
        description="inverse strength of the L2 penalty; the best on a tenth of the train images",
    )
    iterations: int = Field(1000, ge=1, description="of L-BFGS, at most")
    tolerance: float = Field(1e-4, gt=0, description="of the gradient, at which L-BFGS ends")


class SegmentLogistic(PatchClassifierStage[SegmentLogisticConfig]):
    """images + features -> metrics miou, pixel_accuracy, mean_accuracy in per cent, one row a class."""

    packages = ("scikit-learn",)
    Config = SegmentLogisticConfig

    def choices(self) -> list[Choice]:
        """Every strength of the penalty."""
        return [{"c": strength} for strength in self.config.c]

    def tried(self, context: Context, train: Patches, vectors: Tensor) -> Iterator[tuple[Choice, Tensor]]:
        """A regression for each, from the strongest penalty on; each begins where the one before ended."""
        import torch

        regression = self._regression()
        for done, choice in enumerate(sorted(self.choices(), key=lambda one: float(one["c"])), 1):
            self._fit(context, regression, train, choice)
            yield choice, torch.from_numpy(regression.predict(vectors.numpy()))
            context.report_progress(done, len(self.config.c), "values of c")

    def fitted(self, context: Context, train: Patches, choice: Choice) -> Callable[[Tensor], Tensor]:
        """The regression on all train patches."""
        import torch

        regression = self._regression()
        self._fit(context, regression, train, choice)
        return lambda vectors: torch.from_numpy(regression.predict(vectors.numpy()))

    def _regression(self) -> Any:
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(max_iter=self.config.iterations, tol=self.config.tolerance, warm_start=True)

    def _fit(self, context: Context, regression: Any, train: Patches, choice: Choice) -> None:
        """Fits it, and says where it stops before it has converged."""
        import warnings

        from sklearn.exceptions import ConvergenceWarning

        regression.set_params(C=float(choice["c"]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            regression.fit(train.vectors.numpy(), train.labels.numpy())
        if any(issubclass(one.category, ConvergenceWarning) for one in caught):
            context.say(f"c = {choice['c']:g}: no convergence after {self.config.iterations} iterations of L-BFGS")
