"""The `label_efficiency` stage: a score over the share of the labels that is learnt from, for several encoders.

It answers what a user asks of an encoder first: how many labels does it save? Source: docs/methods.md#label-efficiency.
`label_curves.py` draws the labels and judges, `few_label_classifiers.py` learns from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pipeline.stage import Context, Feed, Outcome
from stages.data.requirements import Holding, Mismatch, lacking, single_class
from stages.evaluate.frozen import Evaluation, unfit
from stages.evaluate.label_efficiency_settings import LabelEfficiencyConfig

if TYPE_CHECKING:
    from stages.evaluate.label_curves import LabelCurves


class LabelEfficiency(Evaluation[LabelEfficiencyConfig]):
    """images + features of several encoders -> `NAME/PERCENT`, scores in per cent, and `above/NAME`, mean leads.

    One row a point of a curve.
    """

    packages = ("scikit-learn",)
    Config = LabelEfficiencyConfig

    def mismatches(self, feeds: Mapping[str, Feed]) -> Iterator[Mismatch]:
        """Images without labels or masks, features of other images or of their middle where masks are whole."""
        config, images = self.config, feeds["images"]
        for number in range(len(config.encoders)):
            path = f"encoders.{number}.features"
            yield from unfit(path, feeds[path], images, whole=config.task == "segmentation")
        needs: Holding = "masks" if config.task == "segmentation" else "labels"
        splits = {"train_split": config.train_split, "test_split": config.test_split}
        yield from lacking(images, needs, splits)
        if needs == "masks":
            yield from single_class(images, splits)

    def run(self, context: Context) -> Outcome:
        """Learns from every draw with every encoder, scores the test images, and says what can be told.

        Raises: SourceError for a split without usable images, or whose labels are all of one class.
        """
        from stages.evaluate.few_label_classifiers import read_task
        from stages.evaluate.label_curves import LabelCurves, draw_images

        config = self.config
        curves = LabelCurves([one.name for one in config.encoders], config.fractions)
        problems: list[dict[str, str]] = []
        train_images, draws = 0, [(fraction, draw) for fraction in config.fractions for draw in range(config.draws)]
        for number, one in enumerate(config.encoders):
            task = read_task(context, config, f"encoders.{number}.features", problems if number == 0 else [])
            train_images = len(task.classes_of_images)
            rows = [draw_images(task.classes_of_images, fraction, (config.seed, draw)) for fraction, draw in draws]
            learnt = []
            for (_, draw), images in zip(draws, rows, strict=True):
                learnt.append(task.learn(images, seed=config.seed + draw))
                done = number * len(draws) + len(learnt)
                context.report_progress(done, len(config.encoders) * len(draws), "trainings")
            for (fraction, _), images, units in zip(draws, rows, task.test(learnt), strict=True):
                curves.add(one.name, fraction, len(images), units)
        return self._finish(context, curves, problems, train_images)

    def _finish(
        self, context: Context, curves: LabelCurves, problems: list[dict[str, str]], train_images: int
    ) -> Outcome:
        import pyarrow as pa

        from stages.data.pictures import intervals
        from stages.data.units import Units, write

        config = self.config
        rows = curves.rows(config.resamples, config.seed)
        verdicts = curves.verdicts(rows)
        metrics = {f"{row['encoder']}/{100 * row['fraction']:g}": row["score"] for row in rows}
        for other in curves.encoders[1:]:
            leads = [row["lead"] for row in rows if row["encoder"] == other]
            metrics[f"above/{other}"] = sum(leads) / len(leads)
        context.output.put_table(0, pa.Table.from_pylist(rows))
        write(context.output, config, metrics, Units())
        context.output.put_file("verdict.txt", ("\n".join(verdicts) + "\n").encode())
        shown = {
            name: [(row["images"], row["score"], row["low"], row["high"]) for row in rows if row["encoder"] == name]
            for name in curves.encoders
        }
        score = "top1, %" if config.task == "classification" else "miou, %"
        picture = intervals(shown, title="Score over labelled images", x="labelled train images", y=score)
        context.output.put_file("preview.png", picture)
        for verdict in verdicts:
            context.say(verdict)
        return Outcome(
            metrics=metrics,
            counts={"train": train_images, "test": curves.test_images, "unusable": len(problems)},
            problems=problems,
            notes={"verdicts": verdicts},
            preview="preview.png",
        )
