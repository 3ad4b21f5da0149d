"""The `classify_objects` stage: weighted k-NN on the features of ground-truth boxes (D3SSL's O-KNN), also disturbed.

Source: docs/methods.md#k-nn-of-objects.

Reading order: this file wires, `object_bank.py` lists and balances the objects, `object_vectors.py` encodes them,
`weighted_knn.py` votes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.errors import SourceError
from pipeline.stage import Context, Feed, Outcome
from stages.data.requirements import Mismatch, lacking, split_counts
from stages.evaluate.classify_objects_settings import ClassifyObjectsConfig
from stages.evaluate.frozen import Evaluation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from stages.evaluate.object_bank import SplitObjects
    from stages.evaluate.object_vectors import EncodedObjects, ShownObject
    from stages.models.inference import RGB

_SHOWN_OBJECTS, _SHOWN_NEIGHBORS, _SHOWN_NAMES = 6, 5, 3


class ClassifyObjects(Evaluation[ClassifyObjectsConfig]):
    """images + encoder -> metrics top1, top5 in per cent (and top1_random, top5_random), one row an object."""

    packages = ("timm",)
    units = dict.fromkeys(("top1", "top5"), "%")
    objectives = dict.fromkeys(("top1", "top5"), "max")
    Config = ClassifyObjectsConfig

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[Mismatch]:
        """Images without boxes, a split without any, a single image where surroundings come from others."""
        config, feed = self.config, feeds["images"]
        splits = {"train_split": config.train_split, "test_split": config.test_split}
        yield from lacking(feed, "objects", splits)
        alone = [split for split in self._replaced().values() if split_counts(feed).get(split, {}).get("images") == 1]
        for split in alone:
            what = f"split {split!r} of {feed.stage} has one image, and surroundings are replaced by those of others"
            yield "disturbed", what, "set it to none, or name a split of two images or more"

    def _replaced(self) -> dict[str, str]:
        """Role -> split of the images whose surroundings are replaced."""
        config = self.config
        splits = {"bank": config.train_split, "queries": config.test_split}
        roles = {"none": (), "queries": ("queries",), "both": ("bank", "queries")}[config.disturbed]
        return {role: splits[role] for role in roles}

    def run(self, context: Context) -> Outcome:
        """Encodes the objects of both splits and lets those of the train images vote.

        Raises: SourceError for a split without usable objects, or fewer voting objects than `k`.
        """
        from stages.evaluate.object_bank import balanced, read_objects
        from stages.evaluate.object_vectors import ObjectEncoder, encode_objects
        from stages.models.encoder import Encoder

        config, images = self.config, context.inputs["images"]
        listed = read_objects(context.name, images, "train_split", config.train_split)
        bank = balanced(listed, per_image=config.per_image, per_class=config.per_class, seed=config.seed)
        queries = read_objects(context.name, images, "test_split", config.test_split)
        names = _names(list(images.manifest.notes.get("classes", ())), bank, queries)
        self._state_classes(context, bank, queries, names)
        encoder = Encoder.load(context.inputs["encoder"])
        given = {"": encoder} | ({"_random": encoder.untrained_twin(config.seed)} if config.random_baseline else {})
        encoders = {
            suffix: ObjectEncoder(one, pool_from=config.pool_from, size=config.roi_size, precision=config.precision)
            for suffix, one in given.items()
        }
        problems: list[dict[str, str]] = []
        total = len(bank) + len(queries)

        def encode(role: str, objects: SplitObjects, before: int) -> EncodedObjects:
            return encode_objects(
                images,
                objects,
                encoders,
                config,
                backgrounds=self._backgrounds(context, role),
                batch_size=context.resources.batch_size or 16,
                show=_SHOWN_OBJECTS if role == "queries" else 0,
                problems=problems,
                report=lambda done: context.report_progress(before + done, total, "objects"),
            )

        train = encode("bank", bank, 0)
        test = encode("queries", queries, len(bank))
        self._require_voters(context.name, train, test, problems)
        return self._write(context, train, test, names, problems)

    def _backgrounds(self, context: Context, role: str) -> NDArray[np.int64] | None:
        """Ids of the images that surroundings are taken from; None where they stay. Raises SourceError."""
        import numpy as np

        from stages.data.rows import iter_rows

        split = self._replaced().get(role)
        if split is None:
            return None
        ids = [row["image_id"] for row in iter_rows(context.inputs["images"], ["split"]) if row["split"] == split]
        if len(ids) < 2:
            raise SourceError(
                f"{context.name}: split {split!r} has one image, and surroundings are replaced by those of others: set "
                f"stages.{context.name}.disturbed to none, or name another split"
            )
        return np.array(ids, np.int64)

    def _state_classes(self, context: Context, bank: SplitObjects, queries: SplitObjects, names: list[str]) -> None:
        """Says which classes the vote cannot do justice to. Raises SourceError for a single class."""
        votes, asked = Counter(bank.labels.tolist()), Counter(queries.labels.tolist())
        if len(votes) == 1:
            raise SourceError(
                f"{context.name}: all objects of split {self.config.train_split!r} are of one class, "
                f"{names[next(iter(votes))]}: every vote would be right (name another split)"
            )
        fewest, most = min(votes.values()), max(votes.values())
        context.say(f"{len(bank)} objects of {len(votes)} classes vote, {fewest} to {most} of each")
        if absent := [names[label] for label in sorted(asked) if label not in votes]:
            objects = sum(count for label, count in asked.items() if label not in votes)
            context.say(
                f"{objects} of {len(queries)} test objects cannot be right, as no train object is of their class: "
                f"{', '.join(absent[:_SHOWN_NAMES])}{', ...' if len(absent) > _SHOWN_NAMES else ''}"
            )

    def _require_voters(
        self, stage: str, train: EncodedObjects, test: EncodedObjects, problems: list[dict[str, str]]
    ) -> None:
        if not len(test.objects):
            raise SourceError(
                f"{stage}: no object of split {self.config.test_split!r} can be encoded; the first problem is "
                f"{problems[-1]['key']}: {problems[-1]['reason']}"
            )
        if self.config.k > len(train.objects):
            voters = len(train.objects)
            raise SourceError(
                f"{stage}: k is {self.config.k}, but only {voters} objects of split {self.config.train_split!r} vote: "
                f"set stages.{stage}.k to {max(1, voters)} or less, or let more of a class vote (per_class)"
            )

    def _write(
        self,
        context: Context,
        train: EncodedObjects,
        test: EncodedObjects,
        names: list[str],
        problems: list[dict[str, str]],
    ) -> Outcome:
        import pyarrow as pa
        import torch

        from stages.data.units import write
        from stages.evaluate.weighted_knn import accuracy, nearest, ranks, votes

        config, labels = self.config, torch.from_numpy(test.objects.labels)
        voters: dict[str, Tensor] = {}
        places: dict[str, Tensor] = {}
        predictions: dict[str, Tensor] = {}
        for suffix, vectors in test.by_encoder.items():
            similarity, voters[suffix] = nearest(train.by_encoder[suffix], vectors, config.k)
            theirs = torch.from_numpy(train.objects.labels)[voters[suffix]]
            given = votes(similarity, theirs, len(names), config.temperature)
            places[suffix] = ranks(given, labels)
            predictions[suffix] = given.argsort(dim=1, descending=True, stable=True)[:, 0]
        found = _per_image(test.objects, places[""].tolist())
        metrics = {f"top{n}{suffix}": accuracy(each, n) for suffix, each in places.items() for n in (1, 5)}
        table: dict[str, Any] = {
            "image_id": test.objects.images,
            "object": test.objects.places,
            "label": [names[label] for label in labels.tolist()],
            "prediction": [names[label] for label in predictions[""].tolist()],
        }
        table |= {f"rank{suffix}": pa.array(each.tolist(), pa.int32()) for suffix, each in places.items()}
        context.output.put_table(0, pa.table(table))
        write(context.output, config, metrics, found)
        context.output.put_file("preview.png", _picture(context, train, test, voters[""], predictions[""], names))
        counts = {
            "bank": len(train.objects),
            "test": len(test.objects),
            "images": len(found.names),
            "classes": len(set(train.objects.labels.tolist())),
            "unusable": len(problems),
        }
        return Outcome(metrics=metrics, counts=counts, problems=problems, preview="preview.png")


def _names(classes: list[str], *splits: SplitObjects) -> list[str]:
    """Names of the classes; those that nothing names are called by their number."""
    count = 1 + max(int(split.labels.max()) for split in splits)
    return [*classes, *(str(number) for number in range(len(classes), count))]


def _per_image(objects: SplitObjects, places: list[int]) -> Any:
    """The units: an image's objects are not independent of each other, so that they are drawn together."""
    from stages.data.units import Units

    of_image: dict[int, list[int]] = {}
    for image_id, place in zip(objects.images.tolist(), places, strict=True):
        of_image.setdefault(image_id, []).append(place)
    found = Units()
    for image_id, each in of_image.items():
        values = {f"top{n}": 100 * sum(place < n for place in each) / len(each) for n in (1, 5)}
        found.add(objects.keys[image_id], values, weight=len(each))
    return found


def _picture(
    context: Context, train: EncodedObjects, test: EncodedObjects, voters: Tensor, predictions: Tensor, names: list[str]
) -> bytes:
    """Objects as the encoder saw them, each beside the train objects that voted for it."""
    from stages.data.images import decode
    from stages.data.pictures import neighbor_strip
    from stages.data.rows import iter_rows

    near = [voters[one.row, :_SHOWN_NEIGHBORS].tolist() for one in test.shown]
    wanted = {int(train.objects.images[voter]) for each in near for voter in each}
    pixels = {
        row["image_id"]: decode(row["image"]) for row in iter_rows(context.inputs["images"], ["image"], ids=wanted)
    }

    def crop(voter: int) -> Any:
        x0, y0, x1, y1 = train.objects.boxes[voter].round().astype(int).clip(0)
        image = pixels[int(train.objects.images[voter])]
        top, left = min(y0, image.shape[0] - 1), min(x0, image.shape[1] - 1)
        return image[top : max(y1, top + 1), left : max(x1, left + 1)]

    captions = []
    for one in test.shown:
        truth, given = names[int(test.objects.labels[one.row])], names[int(predictions[one.row])]
        captions.append(f"{truth} (right)" if truth == given else f"{truth} -> {given}")
    return neighbor_strip(
        [_surrounded(one) for one in test.shown],
        [[crop(voter) for voter in each] for each in near],
        [[names[int(train.objects.labels[voter])] for voter in each] for each in near],
        query_captions=captions,
        title="Test objects (truth -> prediction), each beside the train objects that voted most",
    )


def _surrounded(shown: ShownObject) -> RGB:
    """The object's box and about as much around it, as the encoder saw it."""
    import numpy as np

    from stages.data.pictures import draw_boxes

    x0, y0, x1, y1 = shown.box.tolist()
    reach = max(x1 - x0, y1 - y0, 16)
    height, width = shown.pixels.shape[:2]
    left, top = int(max(0, (x0 + x1) / 2 - reach)), int(max(0, (y0 + y1) / 2 - reach))
    right, bottom = int(min(width, (x0 + x1) / 2 + reach + 1)), int(min(height, (y0 + y1) / 2 + reach + 1))
    box = shown.box - np.array([left, top, left, top], np.float32)
    return draw_boxes(shown.pixels[top:bottom, left:right], box[None])
