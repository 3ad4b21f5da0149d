"""Logistic regression on stored features of the images that keep their labels, for `label_efficiency`.

Source: docs/methods.md#label-efficiency.

Shape legend: N rows that are learnt from, D width.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SourceError
from pipeline.stage import Context
from stages.data.units import Units

if TYPE_CHECKING:
    from stages.data.mask_classes import MaskClasses
    from stages.evaluate.label_efficiency_settings import LabelEfficiencyConfig

ITERATIONS = 200  # of L-BFGS, at most
FOLDS = 3


class Task(ABC):
    """One encoder's features of the train and test images, ready to learn from some of them."""

    classes_of_images: list[int]  # of each train image, for draws that keep the share of each

    @abstractmethod
    def learn(self, images: NDArray[np.int64], seed: int) -> Any:
        """A classifier that has learnt from some train images, as `regression` makes it.

        Args:
            images: rows of the train images.
            seed: of the folds.

        Raises: SourceError where these images are all of one class.
        """

    @abstractmethod
    def test(self, classifiers: Sequence[Any]) -> list[Units]:
        """The test units of each classifier; the test images are read once for all of them."""


def read_task(context: Context, config: LabelEfficiencyConfig, path: str, problems: list[dict[str, str]]) -> Task:
    """The task of one encoder.

    Args:
        context: of the stage.
        config: of the stage.
        path: dotted path of the input that holds its features.
        problems: grows by an entry for each image that cannot be used.

    Raises: SourceError for a split without usable images.
    """
    inputs = {"images": context.inputs["images"], "features": context.inputs[path]}
    kind = Classification if config.task == "classification" else Segmentation
    return kind(replace(context, inputs=inputs), config, problems)


class Classification(Task):
    """Image vectors and labels."""

    def __init__(self, context: Context, config: LabelEfficiencyConfig, problems: list[dict[str, str]]) -> None:
        from stages.evaluate.labelled_vectors import read_splits

        self.name, self.config = context.name, config
        self.splits = read_splits(context, config.train_split, config.test_split, "vector")
        problems += self.splits.problems
        self.classes_of_images = self.splits.train.labels.tolist()

    def learn(self, images: NDArray[np.int64], seed: int) -> Any:
        """Of the images' vectors."""
        vectors, labels = self.splits.train.vectors.numpy()[images], self.splits.train.labels.numpy()[images]
        return regression(self.name, vectors, labels, images, self.config.c, seed)

    def test(self, classifiers: Sequence[Any]) -> list[Units]:
        """The top1 of every image."""
        test, found = self.splits.test, []
        for classifier in classifiers:
            right = classifier.predict(test.vectors.numpy()) == test.labels.numpy()
            units = Units()
            for key, hit in zip(test.keys, right.tolist(), strict=True):
                units.add(key, {"top1": 100.0 * hit})
            found.append(units)
        return found


class Segmentation(Task):
    """Patches of the train images by their most frequent class, maps of the test images."""

    def __init__(self, context: Context, config: LabelEfficiencyConfig, problems: list[dict[str, str]]) -> None:
        from stages.data.mask_classes import MaskClasses
        from stages.evaluate.stored_features import masked_ids

        self.name, self.config, self.context, self.problems = context.name, config, context, problems
        self.classes: MaskClasses = MaskClasses.of(context.inputs["images"])
        splits = {"train_split": config.train_split, "test_split": config.test_split}
        ids = masked_ids(context.name, context.inputs["images"], splits)
        self.test_ids = ids["test_split"]
        self._read_train(ids["train_split"])
        self.classes_of_images = [0] * len(self.image_ids)

    def _read_train(self, ids: Sequence[int]) -> None:
        from stages.evaluate.patch_labels import class_pixels
        from stages.evaluate.stored_features import iter_masked, require_some

        vectors, labels, rows, void = [], [], [], len(self.classes.names)
        self.image_ids: list[int] = []
        inputs = self.context.inputs
        for image in iter_masked(inputs["images"], inputs["features"], self.classes, set(ids), self.problems):
            found = class_pixels(image.labels, image.map.shape[:2], void).argmax(dim=1).numpy()
            usable = np.flatnonzero(found < void)
            generator = np.random.default_rng((self.config.seed, image.image_id))
            chosen = np.sort(generator.permutation(usable)[: self.config.patches])
            vectors.append(image.map.reshape(len(found), -1)[chosen])
            labels.append(found[chosen])
            rows.append(np.full(len(chosen), len(self.image_ids)))
            self.image_ids.append(image.image_id)
        require_some(self.name, len(vectors), f"{len(ids)} train", self.problems)
        self.vectors, self.labels, self.rows = (np.concatenate(parts) for parts in (vectors, labels, rows))

    def learn(self, images: NDArray[np.int64], seed: int) -> Any:
        """Of the images' patches."""
        chosen = np.isin(self.rows, images)
        vectors, labels, rows = self.vectors[chosen], self.labels[chosen], self.rows[chosen]
        return regression(self.name, vectors, labels, rows, self.config.c, seed)

    def test(self, classifiers: Sequence[Any]) -> list[Units]:
        """The confusion matrix of every image."""
        import torch
        from torch.nn import functional

        from stages.data.confusion import confusion
        from stages.evaluate.stored_features import iter_masked

        found, inputs = [Units() for _ in classifiers], self.context.inputs
        for image in iter_masked(inputs["images"], inputs["features"], self.classes, set(self.test_ids), []):
            height, width, depth = image.map.shape
            for classifier, units in zip(classifiers, found, strict=True):
                scores_NC = classifier.predict_log_proba(image.map.reshape(-1, depth))
                scores_1Chw = torch.from_numpy(scores_NC).reshape(1, height, width, -1).permute(0, 3, 1, 2)
                enlarged = functional.interpolate(scores_1Chw, image.labels.shape, mode="bilinear")
                prediction = classifier.classes_[enlarged[0].argmax(dim=0).numpy()]
                units.add_matrix(image.key, confusion(image.labels, prediction, len(self.classes.names)))
        return found


def regression(
    stage: str,
    vectors_ND: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    groups_N: NDArray[np.int64],
    strengths: Sequence[float],
    seed: int,
) -> Any:
    """A fitted scikit-learn pipeline: standardised channels, then logistic regression.

    Args:
        stage: its name, for the error.
        vectors_ND: what it learns from.
        labels_N: their classes.
        groups_N: the image that each vector is of; no image is in two folds.
        strengths: inverse strengths of the L2 penalty, of which cross-validation chooses; the middle one where there
            are too few images to hold some out.
        seed: of the folds.

    Raises: SourceError where all vectors are of one class.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    present = np.unique(labels_N)
    if len(present) < 2:
        raise SourceError(
            f"{stage}: the {len(np.unique(groups_N))} images that keep their labels are all of one class: raise the "
            f"smallest of stages.{stage}.fractions"
        )
    middle = sorted(strengths)[len(strengths) // 2]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=middle, max_iter=ITERATIONS))
    images_of_class = [len(np.unique(groups_N[labels_N == one])) for one in present]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # so many steps of L-BFGS are the protocol
        if len(strengths) == 1 or min(images_of_class) < FOLDS:
            return model.fit(vectors_ND, labels_N)
        folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
        search = GridSearchCV(model, {"logisticregression__C": sorted(strengths)}, cv=folds)
        return search.fit(vectors_ND, labels_N, groups=groups_N).best_estimator_
