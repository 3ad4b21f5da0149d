"""The `measure_patches` stage: whether patches of one class are more alike than patches of two (over-dispersion).

Source: docs/methods.md#similarity-of-patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.errors import SourceError
from pipeline.stage import Context, Outcome
from stages.evaluate.frozen import FrozenConfig, FrozenStage

if TYPE_CHECKING:
    from torch import Tensor


class MeasurePatchesConfig(FrozenConfig):
    """Which patches are compared; only the test split is."""

    patches: int = Field(40, ge=1, description="drawn of every image, among those that one class covers")
    cover: float = Field(0.8, gt=0.5, le=1, description="the share of its pixels that a patch's class must have")
    bins: int = Field(20, ge=2, description="of cosine, from -1 to 1")


class MeasurePatches(FrozenStage[MeasurePatchesConfig]):
    """images + features -> metrics auroc, same_class_cosine, other_class_cosine; a row a bin of cosine."""

    units = {"auroc": "%", "same_class_cosine": "", "other_class_cosine": ""}
    objectives = {"auroc": "max", "same_class_cosine": "max", "other_class_cosine": "min"}
    whole_images = True
    Config = MeasurePatchesConfig

    def run(self, context: Context) -> Outcome:
        """Compares patches of different images.

        Raises: SourceError where no image has usable patches.
        """
        import numpy as np
        import pyarrow as pa
        import torch

        from stages.data.pictures import histograms
        from stages.data.units import Units, write
        from stages.evaluate.patch_pairs import auroc, drawn_patches
        from stages.evaluate.stored_features import require_some

        config, problems = self.config, list[dict[str, str]]()
        keys, patches, labels = drawn_patches(
            context, config.test_split, config.patches, config.cover, config.seed, problems
        )
        require_some(context.name, len(keys), "test", problems)
        unit_ND = torch.nn.functional.normalize(torch.cat(patches), dim=1)
        label_N, image_N = torch.cat(labels), torch.repeat_interleave(torch.tensor([len(one) for one in labels]))
        found, same_bins, other_bins = Units(), np.zeros(config.bins, np.int64), np.zeros(config.bins, np.int64)
        for image, key in enumerate(keys):
            mine, others = image_N == image, image_N != image
            cosine: Tensor = unit_ND[mine] @ unit_ND[others].T
            same = label_N[mine][:, None] == label_N[others][None]
            if same.any() and not same.all():
                alike, apart = cosine[same], cosine[~same]
                values = {"auroc": 100 * auroc(alike, apart)}
                values |= {"same_class_cosine": alike.mean().item(), "other_class_cosine": apart.mean().item()}
                found.add(key, values)
                same_bins += np.histogram(alike.numpy(), config.bins, (-1, 1))[0]
                other_bins += np.histogram(apart.numpy(), config.bins, (-1, 1))[0]
            context.report_progress(image + 1, len(keys), "images")
        if not found.names:
            raise SourceError(
                f"{context.name}: all patches that one class covers are of the same class: nothing compares"
            )
        edges = np.linspace(-1, 1, config.bins + 1)
        share = same_bins / np.maximum(same_bins + other_bins, 1)
        table = {"from": edges[:-1], "to": edges[1:], "same": same_bins, "other": other_bins, "share": share}
        context.output.put_table(0, pa.table(table))
        write(context.output, config, found.metrics(), found)
        middle = (edges[:-1] + edges[1:]) / 2
        thousandth = max(1, int((same_bins + other_bins).sum()) // 100_000)
        samples = {
            "same class": np.repeat(middle, same_bins // thousandth),
            "other": np.repeat(middle, other_bins // thousandth),
        }
        title = "Cosine of patches of two images, by whether they are of one class"
        context.output.put_file("preview.png", histograms(samples, title=title, label="cosine", bins=config.bins))
        counts = {"images": len(found.names), "patches": len(label_N), "unusable": len(problems)}
        return Outcome(metrics=found.metrics(), counts=counts, problems=problems, preview="preview.png")
