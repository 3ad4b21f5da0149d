"""Where a test of a fault runs its pipeline: a store of its own on the shared cluster."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.cluster import Cluster
from tests.faults.runs import ROOT, Run, read_store

PIPELINE = """
store: {store}
tracking: null
stages:
  images: {{uses: ingest, source: {source}, layout: coco, limit: 24, shard_rows: 6}}
  boxes: {{uses: selective_search, images: images, strategy: fast, size: 256, max_boxes: 20}}
  superpixels: {{uses: superpixels, images: images, region_size: 20}}
  train:
    uses: pretrain
    images: images
    backbone:
      {{name: vit_tiny_patch16_224, img_size: 32, patch_size: 8, kwargs: {{depth: 2, embed_dim: 32, num_heads: 2}}}}
    method:
      name: dino
      global_crops: {{size: 32, count: 2, scale: [0.4, 1.0]}}
      local_crops: {{size: 16, count: 2, scale: [0.05, 0.4]}}
      head: {{prototypes: 32, hidden: 32, bottleneck: 16}}
    steps: 60
    batch_size: 4
    log_every: 1
    checkpoint_every: 5
    loader_workers: 0
    resources: {{workers: 2, cpus: 1}}
  embeddings: {{uses: embeddings, images: images, encoder: train, resize: 40, crop: 32}}
  neighbors: {{uses: neighbors, embeddings: embeddings, k: 5}}
"""
KINDS = {"train": "encoder"}  # of the stages whose name is not their kind


class Bench:
    """Where a test runs the pipeline: its own store, which may hold some of the undisturbed run's artifacts.

    Args:
        folder: of this test.
        cluster: the runs are on.
        reference: the store of the undisturbed run; None while that is made.
    """

    def __init__(self, folder: Path, cluster: Cluster, reference: Path | None) -> None:
        self.folder, self.cluster, self.reference = folder, cluster, reference
        self.store = folder / "store"
        self.config = folder / "pipeline.yaml"
        self.config.write_text(PIPELINE.format(store=self.store, source=ROOT / "configs" / "quickstart"))

    def give(self, *stages: str) -> None:
        """Put artifacts of the undisturbed run into the store, so that only others are computed."""
        assert self.reference is not None
        for kind in (KINDS.get(stage, stage) for stage in stages):
            shutil.copytree(self.reference / kind, self.store / kind)

    def start(self, *options: str) -> Run:
        """Start the pipeline, or continue it."""
        arguments = ["run", str(self.config), "--address", self.cluster.address, *options]
        return Run(arguments, self.environment, self.folder / "run.log")

    @property
    def environment(self) -> dict[str, str]:
        """Of a driver or submitter."""
        return {**self.cluster.tokens, "TESSERA_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}

    def expect_undisturbed(self, *stages: str) -> None:
        """Check that these stages' artifacts, and nothing else, equal those of the undisturbed run."""
        assert self.reference is not None
        expected, kinds = read_store(str(self.reference)), {KINDS.get(stage, stage) for stage in stages}
        for name in [name for name in expected.files if name.split("/")[0] not in kinds]:
            del expected.files[name], expected.rows[name]
        differences = read_store(str(self.store)).against(expected)
        assert not differences, differences
