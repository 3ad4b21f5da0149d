"""The same sources behind bucket addresses, against moto's S3 server."""

from __future__ import annotations

import uuid
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
def upload(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path, str], str]]:
    """`upload(folder, prefix)` copies a folder to the prefix of a bucket of this test, and returns its address."""
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
    bucket = f"photos-{uuid.uuid4().hex[:8]}"  # moto keeps buckets, and clients are cached by address
    client = boto3.client("s3", endpoint_url=settings["AWS_ENDPOINT_URL"], region_name="us-east-1")
    client.create_bucket(Bucket=bucket)

    def copy(folder: Path, prefix: str) -> str:
        for file in (path for path in folder.rglob("*") if path.is_file()):
            key = f"{prefix}/{file.relative_to(folder).as_posix()}".lstrip("/")
            client.put_object(Bucket=bucket, Key=key, Body=file.read_bytes())
        return f"s3://{bucket}/{prefix}"

    yield copy
    server.stop()


def test_every_kind_of_reading(
    tmp_path: Path, ingest: Run, upload: Callable[[Path, str], str], make_image: Callable[..., Path]
) -> None:
    folder = tmp_path / "up"
    make_image(folder / "birds/train/owl/ä b.jpg")
    (folder / "birds/train/owl/bad.jpg").write_bytes(b"?")
    make_image(folder / "coco/images/val/1.jpg", 20, 10)
    write_json(folder / "coco/instances_val.json", [image(1)], [annotation(1, 1)])
    write(folder / "tables/train.parquet", {"image": IMAGES})
    everything = upload(folder, "all")

    birds = ingest(source=f"{everything}/birds/")
    assert [(row["key"], row["label"], row["split"]) for row in birds.rows] == [("train/owl/ä b.jpg", "owl", "train")]
    assert birds.rows[0]["image"] == (folder / "birds/train/owl/ä b.jpg").read_bytes()
    assert "not an image" in birds.reasons["train/owl/bad.jpg"]

    coco = ingest(source=f"{everything}/coco", layout="coco")
    assert [len(row["objects"]) for row in coco.rows] == [1]

    for address in (f"{everything}/tables", f"{everything}/tables/train.parquet"):
        assert [row["image"] for row in ingest(source=address, layout="parquet").rows] == IMAGES

    with pytest.raises(SourceError, match=r"s3://photos-\w+/all/nothing is empty"):
        ingest(source=f"{everything}/nothing")


def test_one_table_at_the_top_of_a_bucket(tmp_path: Path, ingest: Run, upload: Callable[[Path, str], str]) -> None:
    write(tmp_path / "up/set.parquet", {"image": [encode(smooth_pixels(8, 8))]})
    top = upload(tmp_path / "up", "")
    assert len(ingest(source=f"{top}set.parquet", layout="parquet").rows) == 1


def test_credentials_in_a_profile_serve_every_layout(
    tmp_path: Path,
    ingest: Run,
    upload: Callable[[Path, str], str],
    make_image: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path / "up/tables/set.parquet", {"image": IMAGES})
    make_image(tmp_path / "up/photos/1.jpg")
    everything = upload(tmp_path / "up", "all")
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = test\naws_secret_access_key = test\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert len(ingest(source=f"{everything}/photos").rows) == 1
    assert len(ingest(source=f"{everything}/tables", layout="parquet").rows) == len(IMAGES)


def test_no_such_bucket(ingest: Run, upload: Callable[[Path, str], str]) -> None:
    with pytest.raises(SourceError, match=r"source s3://elsewhere.*no such bucket"):
        ingest(source="s3://elsewhere/x")
