"""The `classify_few_shot` stage: N-way K-shot episodes by the nearest class mean.

Source: docs/methods.md#few-shot-classification.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.errors import SourceError
from pipeline.stage import Context, Feed, Outcome
from stages.data.requirements import Mismatch, split_counts
from stages.evaluate.frozen import FrozenConfig, FrozenStage

if TYPE_CHECKING:
    from stages.evaluate.labelled_vectors import LabelledVectors


class ClassifyFewShotConfig(FrozenConfig):
    """The protocol's numbers: shots are drawn from the train split, queries from the test split."""

    ways: int = Field(5, ge=2, description="classes of an episode")
    shots: int = Field(5, ge=1, description="train images of each class")
    queries: int = Field(15, ge=1, description="test images of each class, or all there are")
    episodes: int = Field(600, ge=2, description="draws of classes, shots and queries")
    pooling: Literal["vector", "mean"] = Field("vector", description="what the encoder gives, or the mean of patches")


class ClassifyFewShot(FrozenStage[ClassifyFewShotConfig]):
    """images + features -> metric accuracy in per cent over all episodes, its 95 % interval in the notes."""

    units = {"accuracy": "%"}
    needs = "labels"
    Config = ClassifyFewShotConfig

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[Mismatch]:
        """Fewer classes than ways."""
        yield from super().mismatches(feeds)
        there = split_counts(feeds["images"]).get(self.config.train_split, {}).get("label_classes")
        if there is not None and there < self.config.ways:
            what = f"an episode has {self.config.ways} classes, and the labelled train images are of {there}"
            yield "ways", what, f"set it to {max(2, there)} or fewer"

    def run(self, context: Context) -> Outcome:
        """Draws the episodes and scores them.

        Raises: SourceError where fewer classes than `ways` have enough images.
        """
        import numpy as np
        import torch

        from stages.data.units import Units, write
        from stages.evaluate.labelled_vectors import read_splits

        config = self.config
        splits = read_splits(context, config.train_split, config.test_split, config.pooling)
        shots, queries = _by_class(splits.train), _by_class(splits.test)
        usable = sorted(label for label, rows in shots.items() if len(rows) >= config.shots and label in queries)
        if len(usable) < config.ways:
            few = [splits.classes[label] for label, rows in sorted(shots.items()) if len(rows) < config.shots]
            raise SourceError(
                f"{context.name}: {len(usable)} classes have {config.shots} train images and a test image, an episode "
                f"needs {config.ways}" + (f"; too few shots: {', '.join(few[:5])}" if few else "")
            )
        train = torch.nn.functional.normalize(splits.train.vectors, dim=1)
        test = torch.nn.functional.normalize(splits.test.vectors, dim=1)
        found = Units()
        for episode in range(config.episodes):
            generator = np.random.default_rng((config.seed, episode))
            means, asked, truth = [], [], []
            for way, label in enumerate(generator.choice(usable, config.ways, replace=False).tolist()):
                means.append(train[generator.choice(shots[label], config.shots, replace=False)].mean(dim=0))
                rows = generator.permutation(queries[label])[: config.queries]
                asked.append(test[rows])
                truth += [way] * len(rows)
            distance = torch.cdist(torch.cat(asked), torch.stack(means))
            right = (distance.argmin(dim=1) == torch.tensor(truth)).float().mean().item()
            found.add(f"episode {episode}", {"accuracy": 100 * right})
            if episode % 50 == 49:
                context.report_progress(episode + 1, config.episodes, "episodes")
        write(context.output, config, found.metrics(), found)
        values = np.array(found.values["accuracy"])
        interval = 1.96 * values.std(ddof=1) / len(values) ** 0.5
        return Outcome(
            metrics=found.metrics(),
            counts={"episodes": config.episodes, "classes": len(usable), "unusable": len(splits.problems)},
            problems=splits.problems,
            notes={"interval": float(interval)},
        )


def _by_class(vectors: LabelledVectors) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(vectors.labels.tolist()):
        rows.setdefault(label, []).append(row)
    return rows
