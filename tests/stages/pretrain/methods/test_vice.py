"""vice on tiny backbones: terms, gradients, prototypes, queue, resume and ranks, and settings that do not fit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.errors import UsageError
from stages.models.feature_extractor import ObjectAwareFilter
from stages.pretrain.data.batch import Batch
from stages.pretrain.methods.method import Step
from stages.pretrain.methods.vice.method import ViCE, region_index
from stages.pretrain.methods.vice.regions import MASKED
from stages.pretrain.methods.vice.settings import ViCESettings
from stages.pretrain.methods.vice.views import view_plan
from stages.pretrain.views.draw import generator
from stages.pretrain.views.plan import Drawn, ImageRow
from stages.regions.segments import grid_labels
from tests.conftest import smooth_pixels
from tests.stages.pretrain.methods.ranks import Results, on_one_and_two, steps_of
from tests.stages.pretrain.methods.tiny import tiny_encoder, train_step

STEP = Step(index=3, total=10, steps_per_epoch=2)
SMALL: dict[str, Any] = {
    "superpixels": "superpixels",
    "standard": {"size": 48},
    "views": 3,
    "size": 32,
    "decoder": {"name": "fpn", "width": 16},
    "prototypes": 12,
    "frozen_steps": 2,
    "queue": {"size": 200, "start": 2},
}


def settings(**changes: Any) -> ViCESettings:
    return ViCESettings.model_validate(SMALL | changes)


def build(*, resnet: bool = False, **changes: Any) -> ViCE:
    method = settings(**changes).build(tiny_encoder(resnet=resnet), total_steps=10, steps_per_epoch=2, global_batch=8)
    assert isinstance(method, ViCE)
    for module in method.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # so that runs can be compared
    return method.train()


def image_row(image_id: int = 0, width: int = 64, height: int = 48, labels: Any = None) -> ImageRow:
    pixels = smooth_pixels(width, height, image_id)
    pixels[height // 3 : height // 2, width // 3 : width // 2] = 0  # edges, for the content map
    labels = grid_labels(height, width, 6) if labels is None else labels
    return ImageRow(image_id, width, height, lambda: pixels, superpixels=labels)


def drawn(config: ViCESettings, row: ImageRow, seed: int = 5) -> Drawn:
    drawer = view_plan(config).drawer
    assert drawer is not None
    return drawer(generator(seed, 0, 0, row.image_id), row)


def drawn_batch(config: ViCESettings, *, count: int = 8, first: int = 0) -> Batch:
    """Real draws for made-up images; pixels are noise of each image's own generator."""
    items, pixels = [], []
    for image_id in range(first, first + count):
        items.append(drawn(config, image_row(image_id)))
        rng = np.random.default_rng(image_id)
        pixels.append(rng.standard_normal((config.views, 3, config.size, config.size)).astype(np.float32))
    extras = {name: torch.from_numpy(np.stack([d.extras[name] for d in items])) for name in items[0].extras}
    return Batch(
        torch.arange(first, first + count),
        torch.zeros(count, dtype=torch.int64),
        {"view": torch.from_numpy(np.stack(pixels, 1))},
        {"view": torch.from_numpy(np.stack([[d.affine for d in item.draws] for item in items], 1)).float()},
        extras=extras,
        seed=7,
        offset=first,
    )


def sgd_step(method: ViCE, batch: Batch, step: Step = STEP, lr: float = 0.1) -> dict[str, float]:
    return train_step(method, batch, torch.optim.SGD(method.trained_parameters(), lr=lr), step)


# ------------------------------------------------------------------------------------------------------------ terms
VARIANTS: dict[str, dict[str, Any]] = {
    "fpn": {},
    "deeplab": {"decoder": {"name": "deeplab", "width": 16}},
    "representative": {"region": "representative"},
    "paper_pooling": {"pool_order": "norm_then_mean", "loss_mean": "per_image"},
    "pixels": {"superpixels": None, "decomposition": "pixels"},
    "nominal_masks": {"mask": {"centre": "nominal"}},
    "square": {"standard": {"kind": "square", "size": 48}},
}


@pytest.mark.parametrize("resnet", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_terms_are_finite_and_every_parameter_learns(name: str, resnet: bool) -> None:
    method = build(resnet=resnet, **VARIANTS[name])
    batch = drawn_batch(method.settings)
    sgd_step(method, batch)
    method.start_step(STEP)
    terms = method(batch)
    assert set(terms) == set(method.settings.term_weights())
    assert all(term.ndim == 0 and torch.isfinite(term) and term > 0 for term in terms.values()), terms
    torch.stack(list(terms.values())).sum().backward()
    # A ViT's last norm has no gradient for [CLS], but every parameter takes part through the patches.
    silent = [
        key
        for key, parameter in method.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert silent == []
    assert all(np.isfinite(value) for value in method.diagnostics().values())


def test_the_first_view_is_only_a_target() -> None:
    method = build()
    batch = drawn_batch(method.settings, count=2)
    caught: list[torch.Tensor] = []
    method.network.register_forward_hook(lambda _module, _args, out: caught.append(out) or out.retain_grad())
    method(batch)["swapped"].backward()
    gradient = caught[0].grad.unflatten(0, (3, 2)).abs().sum(dim=(1, 2, 3, 4))
    assert gradient[0] == 0
    assert (gradient[1:] > 0).all()


def test_pooling_matches_a_loop_over_regions() -> None:
    method = build(loss_mean="per_image")
    batch = drawn_batch(method.settings, count=3)
    count = batch.extras["count"]
    maps = torch.randn(9, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    index = region_index(batch.extras["regions"].transpose(0, 1).long(), count, int(count.sum()))
    z, _ = method._pooled(maps, index, count, int(count.sum()))
    at = 0
    for image, number in enumerate(count.tolist()):
        for region in range(number):
            for view in range(3):
                pixels = maps.unflatten(0, (3, 3))[view, image][:, batch.extras["regions"][image, view] == region]
                torch.testing.assert_close(z[view, at], torch.nn.functional.normalize(pixels.mean(1), dim=0))
            at += 1


def test_mean_over_regions_or_images() -> None:
    """Images with different numbers of regions: the two means differ, and each is what it says."""
    flat, paper = build(), build(loss_mean="per_image")
    count = torch.tensor([1, 3])
    torch.testing.assert_close(flat._weights(count, 4).float(), torch.full((4,), 0.25))
    torch.testing.assert_close(paper._weights(count, 4).float(), torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6]))


def test_masked_pixels_are_noise_that_no_rank_changes() -> None:
    method = build(mask={"ratio": 1.0})
    batch = drawn_batch(method.settings, count=4)
    regions = batch.extras["regions"].transpose(0, 1).long()
    filled = method._filled(batch, regions)
    masked = (regions == MASKED)[:, :, None].expand_as(filled)
    assert masked.any()
    assert filled[masked].abs().max() <= 1
    assert torch.equal(filled[~masked], batch.views["view"][~masked])
    half = drawn_batch(method.settings, count=2, first=2)
    assert torch.equal(method._filled(half, regions[:, 2:]), filled[:, 2:])


def test_training_lowers_the_loss() -> None:
    method = build(frozen_steps=0, mask={"ratio": 0.0})
    batch = drawn_batch(method.settings)
    optimizer = torch.optim.AdamW(method.trained_parameters(), lr=3e-3)
    losses = []
    for index in range(15):
        step = Step(index, 15, 1)
        method.start_step(step)
        losses.append(method(batch)["swapped"])
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step)
    assert losses[-1] < 0.8 * losses[0]


# -------------------------------------------------------------------------------------------- prototypes and queue
def test_prototypes_wait_and_stay_on_the_sphere() -> None:
    method = build(frozen_steps=4)
    batch = drawn_batch(method.settings)
    before = method.prototypes.detach().clone()
    sgd_step(method, batch, Step(3, 10, 2), lr=1.0)
    torch.testing.assert_close(method.prototypes.detach(), before)
    sgd_step(method, batch, Step(4, 10, 2), lr=1.0)
    assert (method.prototypes - before).abs().max() > 1e-4
    torch.testing.assert_close(method.prototypes.norm(dim=1), torch.ones(12))


def test_queue_fills_newest_first_and_is_used_late() -> None:
    method = build(queue={"size": 10_000, "start": 5})
    first, second = drawn_batch(method.settings), drawn_batch(method.settings, first=8)
    sgd_step(method, first)
    held = int(method.queue_filled)
    assert held == int(first.extras["count"].sum())
    older = method.queue[:held].clone()
    sgd_step(method, second)
    now = int(method.queue_filled)
    assert torch.equal(method.queue[now - held : now], older)
    assert method.queue[now:].abs().sum() == 0
    losses = {}
    for index in (4, 5):
        method.start_step(Step(index, 10, 2))
        losses[index] = method(first)["swapped"].item()
    assert losses[4] != losses[5]


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_batch_larger_than_the_queue_is_truncated(size: int) -> None:
    method = build(queue={"size": size, "start": 0})
    batch = drawn_batch(method.settings)
    assert int(batch.extras["count"].sum()) > 7
    for index in range(3):
        assert all(np.isfinite(value) for value in sgd_step(method, batch, Step(index, 10, 2)).values())
    assert method.queue.shape == (size, 16)
    assert int(method.queue_filled) == size


def test_state_round_trips() -> None:
    method = build()
    batch = drawn_batch(method.settings)
    for index in range(3):
        sgd_step(method, batch, Step(index, 10, 2))
    resumed = build()
    resumed.load_state_dict(method.state_dict())
    for index in (3, 4):
        assert sgd_step(method, batch, Step(index, 10, 2)) == sgd_step(resumed, batch, Step(index, 10, 2))
    for key, value in method.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


# ------------------------------------------------------------------------------------------------------- bad inputs
def test_settings_say_what_is_wrong() -> None:
    for changes, message in (
        ({"superpixels": None}, "name a stage of kind superpixels"),
        ({"decomposition": "pixels"}, "needs none"),
        ({"resize": (2.0, 0.5)}, "the smaller first"),
        ({"region": "representative", "pool_order": "norm_then_mean"}, "a representative is one pixel"),
        ({"weights": {"swaped": 1}}, "no such term"),
    ):
        with pytest.raises(ValidationError, match=message):
            settings(**changes)
    assert settings().term_weights() == {"swapped": 1.0}
    assert settings(region="representative").term_weights() == {"swapped": 0.5, "coherence": 0.5}


def test_a_filter_is_refused() -> None:
    encoder = tiny_encoder()
    encoder.filter = ObjectAwareFilter(width=24, prototypes=4)
    with pytest.raises(UsageError, match="no object-aware filter sees"):
        settings().build(encoder, total_steps=1, steps_per_epoch=1, global_batch=1)


# ------------------------------------------------------------------------------------------------------------ ranks
def _train(rank: int, world_size: int) -> Results:
    results: Results = {}
    for name in ("vit", "resnet", "per_image", "representative"):
        changes = {"resnet": {}, "vit": {}, "per_image": VARIANTS["paper_pooling"]} | {
            "representative": VARIANTS["representative"]
        }
        method = build(resnet=name == "resnet", frozen_steps=1, queue={"size": 150, "start": 1}, **changes[name])
        method = method.double()
        share = 4 // world_size
        batch = drawn_batch(method.settings, count=share, first=rank * share)
        batch.views["view"] = batch.views["view"].double()
        terms = torch.stack([values for values, _ in steps_of(method, [batch] * 3, world_size, lr=0.1)])
        rows = method.queue[: int(method.queue_filled)].clone()
        results[name] = (terms, method.prototypes.detach().clone(), rows)
    return results


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    one, two = on_one_and_two(_train, tmp_path)
    for name, rank in itertools.product(one, range(2)):
        for mine, theirs in zip(two[rank][name], one[name], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
