"""The same sources behind bucket addresses, against moto's S3 server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

from pipeline.errors import SourceError
from tests.conftest import encode, smooth_pixels
from tests.stages.ingest.conftest import Ingested
from tests.stages.ingest.test_coco import annotation, image, write_json
from tests.stages.ingest.test_parquet import IMAGES, write

Run = Callable[..., Ingested]


@pytest.fixture
def upload(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path, str], None]]:
    """`upload(folder, prefix)` copies a folder to s3://photos/prefix."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=settings["AWS_ENDPOINT_URL"], region_name="us-east-1")
    client.create_bucket(Bucket="photos")

    def copy(folder: Path, prefix: str) -> None:
        for file in (path for path in folder.rglob("*") if path.is_file()):
            key = f"{prefix}/{file.relative_to(folder).as_posix()}".lstrip("/")
            client.put_object(Bucket="photos", Key=key, Body=file.read_bytes())

    yield copy
    server.stop()


def test_every_kind_of_reading(
    tmp_path: Path, ingest: Run, upload: Callable[[Path, str], None], make_image: Callable[..., Path]
) -> None:
    folder = tmp_path / "up"
    make_image(folder / "birds/train/owl/ä b.jpg")
    (folder / "birds/train/owl/bad.jpg").write_bytes(b"?")
    make_image(folder / "coco/images/val/1.jpg", 20, 10)
    write_json(folder / "coco/instances_val.json", [image(1)], [annotation(1, 1)])
    write(folder / "tables/train.parquet", {"image": IMAGES})
    upload(folder, "all")

    birds = ingest(source="s3://photos/all/birds/")
    assert [(row["key"], row["label"], row["split"]) for row in birds.rows] == [("train/owl/ä b.jpg", "owl", "train")]
    assert birds.rows[0]["image"] == (folder / "birds/train/owl/ä b.jpg").read_bytes()
    assert "not an image" in birds.reasons["train/owl/bad.jpg"]

    coco = ingest(source="s3://photos/all/coco", layout="coco")
    assert [len(row["objects"]) for row in coco.rows] == [1]

    for address in ("s3://photos/all/tables", "s3://photos/all/tables/train.parquet"):
        assert [row["image"] for row in ingest(source=address, layout="parquet").rows] == IMAGES

    with pytest.raises(SourceError, match="s3://photos/nothing is empty"):
        ingest(source="s3://photos/nothing")


def test_one_table_at_the_top_of_a_bucket(tmp_path: Path, ingest: Run, upload: Callable[[Path, str], None]) -> None:
    write(tmp_path / "up/set.parquet", {"image": [encode(smooth_pixels(8, 8))]})
    upload(tmp_path / "up", "")
    assert len(ingest(source="s3://photos/set.parquet", layout="parquet").rows) == 1


def test_no_such_bucket(ingest: Run, upload: Callable[[Path, str], None]) -> None:
    with pytest.raises(SourceError, match=r"source s3://elsewhere.*no such bucket"):
        ingest(source="s3://elsewhere/x")
