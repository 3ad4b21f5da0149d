"""The `classify_knn` stage: weighted k-NN on frozen image vectors (DINO's protocol).

Source: docs/methods.md#weighted-k-nn.

Reading order: this file wires, `classify_knn_vectors.py` encodes a split, `weighted_knn.py` is the vote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from pipeline.errors import SourceError
from pipeline.stage import Context, Feed, Outcome
from stages.data.requirements import lacking, split_counts
from stages.evaluate.classify_knn_settings import ClassifyKnnConfig
from stages.evaluate.frozen import Evaluation
from stages.models.planned import backbone_of, undivided

if TYPE_CHECKING:
    from pipeline.store.artifact import Artifact
    from stages.evaluate.classify_knn_vectors import SplitVectors, Votes

_SHOWN_IMAGES, _SHOWN_NEIGHBORS = 6, 5
_SHOWN_NAMES = 3


class ClassifyKnn(Evaluation[ClassifyKnnConfig]):
    """images + encoder -> metrics top1, top5 in per cent (and top1_random, top5_random), one row a test image."""

    version = 3
    packages = ("timm",)
    units = dict.fromkeys(("top1", "top5"), "%")
    objectives = dict.fromkeys(("top1", "top5"), "max")
    Config = ClassifyKnnConfig

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[tuple[str, str, str]]:
        """Images without labels, a split without any, train images of one class or fewer than `k`; no whole patches."""
        config, feed = self.config, feeds["images"]
        yield from undivided(backbone_of(feeds.get("encoder")), {"crop": config.crop})
        yield from lacking(feed, "labels", {"train_split": config.train_split, "test_split": config.test_split})
        train = split_counts(feed).get(config.train_split, {})
        images, name = train.get("labels"), f"split {config.train_split!r} of {feed.stage}"
        if images and images < config.k:
            yield (
                "k",
                f"k is {config.k}, but {name} has {images} labelled images that can vote",
                f"set it to {images} or less",
            )
        if images and train.get("label_classes") == 1:
            remedy = "name the folder that holds the class folders, or another split"
            yield "train_split", f"all labelled images of {name} are of one class: every vote would be right", remedy

    def run(self, context: Context) -> Outcome:
        """Encodes both splits and lets the train images vote.

        Raises: SourceError for a split without usable labelled images, UsageError for a crop that does not split into
            patches.
        """
        from stages.evaluate.classify_knn_vectors import encode_split, judge
        from stages.models.encoder import Encoder
        from stages.models.inference import require_size

        config, images = self.config, context.inputs["images"]
        classes: list[str] = list(images.manifest.notes.get("classes", ()))
        train_labels, test_labels = self._labelled(context.name, images)
        self._state_classes(context, train_labels, test_labels, classes)
        encoder = Encoder.load(context.inputs["encoder"])
        require_size(encoder, config.crop, f"stages.{context.name}.crop")
        encoders = {"": encoder}
        if config.random_baseline:
            encoders["_random"] = encoder.untrained_twin(config.seed)

        problems: list[dict[str, str]] = []
        total = len(train_labels) + len(test_labels)

        def encode(role: str, labels: Mapping[int, int], before: int) -> SplitVectors:
            return encode_split(
                images,
                labels,
                encoders,
                config,
                folder=context.output.scratch / role,
                batch_size=context.resources.batch_size or 64,
                problems=problems,
                report=partial(_report, context, before, total),
            )

        train = encode("train", train_labels, 0)
        test = encode("test", test_labels, len(train.ids))
        self._require_voters(context.name, train, test)
        count = max(len(classes), 1 + max(int(split.labels.max()) for split in (train, test)))
        judged = {
            suffix: judge(train, test, suffix, count, k=config.k, temperature=config.temperature) for suffix in encoders
        }
        metrics = {name + suffix: value for suffix, votes in judged.items() for name, value in votes.metrics().items()}
        self._write(context, metrics, _names(classes, count), test, judged)
        self._preview(context, _names(classes, count), train, test, judged[""])
        return Outcome(
            metrics=metrics,
            counts={
                "train": len(train.labels),
                "test": len(test.labels),
                "classes": count,
                "unreadable": len(problems),
            },
            problems=problems,
            preview="preview.png",
        )

    def _labelled(self, stage: str, images: Artifact) -> tuple[dict[int, int], dict[int, int]]:
        """{image_id: label_id} of the train and of the test split. Raises SourceError for a split without labels."""
        from stages.data.prepared import split_error
        from stages.data.rows import iter_rows

        splits = {"train": self.config.train_split, "test": self.config.test_split}
        labels: dict[str, dict[int, int]] = {role: {} for role in splits}
        for row in iter_rows(images, ["split", "label_id"]):
            for role, split in splits.items():
                if row["split"] == split and row["label_id"] is not None:
                    labels[role][row["image_id"]] = row["label_id"]
        for role, split in splits.items():
            if not labels[role]:
                raise split_error(
                    stage,
                    images,
                    split,
                    "a label",
                    f"set stages.{stage}.{role}_split to a split that has, ingest class folders, or ingest with "
                    "label: largest_object where there are boxes",
                )
        return labels["train"], labels["test"]

    def _state_classes(
        self, context: Context, train: Mapping[int, int], test: Mapping[int, int], classes: list[str]
    ) -> None:
        """Says which classes the vote cannot do justice to. Raises SourceError for a single class."""
        votes, asked = Counter(train.values()), Counter(test.values())
        names = _names(classes, 1 + max(*votes, *asked))
        if len(votes) == 1:
            raise SourceError(
                f"{context.name}: all labelled images of split {self.config.train_split!r} are of one class, "
                f"{names[next(iter(votes))]}: every vote would be right (ingest class folders, or name another split)"
            )
        single = [names[label] for label in sorted(votes) if votes[label] == 1]
        if single and self.config.k > 1:
            context.say(
                f"{len(single)} of {len(votes)} classes have one train image only, whose one vote "
                f"the others of k = {self.config.k} can outweigh: {_some(single)}"
            )
        absent = [names[label] for label in sorted(asked) if label not in votes]
        if absent:
            images = sum(count for label, count in asked.items() if label not in votes)
            context.say(
                f"{images} of {len(test)} test images cannot be right, as no train image is of their "
                f"class: {_some(absent)}"
            )

    def _require_voters(self, stage: str, train: SplitVectors, test: SplitVectors) -> None:
        if not len(test.labels):
            raise SourceError(
                f"{stage}: no image of split {self.config.test_split!r} can be decoded; see the images' stage"
            )
        if self.config.k > len(train.labels):
            raise SourceError(
                f"{stage}: k is {self.config.k}, but split {self.config.train_split!r} has {len(train.labels)} usable "
                f"labelled images: set stages.{stage}.k to {max(1, len(train.labels))} or less"
            )

    def _write(
        self,
        context: Context,
        metrics: Mapping[str, float],
        classes: list[str],
        test: SplitVectors,
        judged: Mapping[str, Votes],
    ) -> None:
        import pyarrow as pa

        from stages.data.units import hits, write

        votes = judged[""]
        table = {
            "image_id": pa.array(test.ids, pa.int64()),
            "label": [classes[label] for label in test.labels.tolist()],
            "prediction": [classes[label] for label in votes.predictions.tolist()],
            "rank": pa.array(votes.ranks.tolist(), pa.int32()),  # of the true class; 0 is a hit
        }
        if "_random" in judged:
            table["rank_random"] = pa.array(judged["_random"].ranks.tolist(), pa.int32())
        context.output.put_table(0, pa.table(table))
        write(context.output, self.config, metrics, hits(test.keys, votes.ranks.tolist()))

    def _preview(
        self, context: Context, classes: list[str], train: SplitVectors, test: SplitVectors, votes: Votes
    ) -> None:
        """Test images, each beside the train images that voted for it."""
        import numpy as np

        from stages.data.images import decode
        from stages.data.pictures import neighbor_strip
        from stages.data.rows import iter_rows

        shown = np.unique(np.linspace(0, len(test.ids) - 1, _SHOWN_IMAGES).astype(int)).tolist()
        voters = votes.neighbors[shown, :_SHOWN_NEIGHBORS].tolist()
        wanted = {test.ids[i] for i in shown} | {train.ids[row] for near in voters for row in near}
        pixels = {
            row["image_id"]: decode(row["image"]) for row in iter_rows(context.inputs["images"], ["image"], ids=wanted)
        }
        sheet = neighbor_strip(
            [pixels[test.ids[i]] for i in shown],
            [[pixels[train.ids[row]] for row in near] for near in voters],
            [[classes[int(train.labels[row])] for row in near] for near in voters],
            query_captions=[
                f"{truth} (right)" if truth == given else f"{truth} -> {given}"
                for truth, given in ((classes[int(test.labels[i])], classes[int(votes.predictions[i])]) for i in shown)
            ],
            title="Test images (truth -> prediction), each beside the train images that voted most",
        )
        context.output.put_file("preview.png", sheet)


def _report(context: Context, before: int, total: int, done: int) -> None:
    """Progress over both splits: `done` images of this one, `before` of the one before it."""
    context.report_progress(before + done, total, "images")


def _names(classes: list[str], count: int) -> list[str]:
    """Names of `count` classes; those that nothing names are called by their number."""
    return [*classes, *(str(i) for i in range(len(classes), count))]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")
