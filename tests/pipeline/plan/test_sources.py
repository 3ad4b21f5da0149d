"""A source's identity is its content, for files, folders and buckets; and it is read again only when it has changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import SourceError
from pipeline.plan import sources
from pipeline.plan.sources import source_digest
from pipeline.store import patience
from pipeline.store.client import client_of
from pipeline.store.objects import Objects
from pipeline.store.store import ArtifactStore
from tests.pipeline.store.faulty_proxy import at_random, faulty_proxy


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of a local source that were read since the list was last cleared."""
    paths: list[str] = []
    digest = sources._Local.digest

    def counted(self: sources._Local, path: str) -> str:
        paths.append(path)
        return digest(self, path)

    monkeypatch.setattr(sources._Local, "digest", counted)
    return paths


def test_a_folder(scenes: Path, store: ArtifactStore) -> None:
    found = source_digest(str(scenes), store)
    assert (found.files, found.bytes) == (2, 11)
    assert len(found.digest) == 64


def test_a_second_look_opens_no_file_and_reads_no_long_memo(
    scenes: Path, store: ArtifactStore, opened: list[str]
) -> None:
    first = source_digest(str(scenes), store)
    assert sorted(opened) == ["a.jpg", "sub/b.jpg"]
    opened.clear()
    assert source_digest(str(scenes), store) == first
    assert opened == []


def test_touched_files_are_read_again_and_change_nothing(scenes: Path, store: ArtifactStore, opened: list[str]) -> None:
    first = source_digest(str(scenes), store)
    os.utime(scenes / "a.jpg", (1, 1))
    opened.clear()
    assert source_digest(str(scenes), store) == first
    assert opened == ["a.jpg"]
    opened.clear()
    assert source_digest(str(scenes), store) == first
    assert opened == []


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a.jpg").write_bytes(b"other"),
        lambda folder: (folder / "a.jpg").rename(folder / "c.jpg"),
        lambda folder: (folder / "sub" / "b.jpg").unlink(),
        lambda folder: (folder / "new.jpg").write_bytes(b""),
        lambda folder: (folder / "sub").rename(folder / "bus"),
    ],
)
def test_every_change_of_content_or_path_changes_the_digest(
    scenes: Path, store: ArtifactStore, change: Callable[[Path], object]
) -> None:
    first = source_digest(str(scenes), store)
    change(scenes)
    assert source_digest(str(scenes), store).digest != first.digest


def test_same_size_and_times_do_not_hide_a_change(scenes: Path, store: ArtifactStore) -> None:
    """Change a file and keep its size and its times, as `cp -p` over it does."""
    first = source_digest(str(scenes), store)
    stat = (scenes / "a.jpg").stat()
    (scenes / "a.jpg").write_bytes(b"tsrif")
    os.utime(scenes / "a.jpg", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source_digest(str(scenes), store).digest != first.digest


def test_a_write_right_after_a_look_is_seen(scenes: Path, store: ArtifactStore) -> None:
    """Twenty changes without a pause, all of the same size: each gives another digest."""
    seen = set()
    for i in range(20):
        (scenes / "a.jpg").write_bytes(b"%05d" % i)
        seen.add(source_digest(str(scenes), store).digest)
    assert len(seen) == 20


def test_moved_and_copied_folders_keep_their_digest(scenes: Path, store: ArtifactStore, tmp_path: Path) -> None:
    first = source_digest(str(scenes), store)
    shutil.copytree(scenes, tmp_path / "copy")
    scenes.rename(tmp_path / "moved")
    assert source_digest(str(tmp_path / "copy"), store) == first
    assert source_digest(f"file://{tmp_path}/moved/", store) == first


def test_the_memo_is_by_place_not_by_spelling(
    scenes: Path, store: ArtifactStore, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source_digest(str(scenes), store)
    opened.clear()
    monkeypatch.chdir(scenes.parent)
    source_digest("./scenes/", store)
    assert opened == []


def test_names_with_a_dot_do_not_count(scenes: Path, store: ArtifactStore) -> None:
    first = source_digest(str(scenes), store)
    (scenes / ".DS_Store").write_bytes(b"x")
    (scenes / ".git").mkdir()
    (scenes / ".git" / "HEAD").write_bytes(b"x")
    assert source_digest(str(scenes), store) == first


def test_a_file_is_its_content_whatever_its_name(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "one.pt").write_bytes(b"weights")
    (tmp_path / "two.pt").write_bytes(b"weights")
    one = source_digest(str(tmp_path / "one.pt"), store)
    assert one == source_digest(str(tmp_path / "two.pt"), store)
    assert (one.files, one.bytes) == (1, 7)


def test_links_are_followed_and_rings_end(scenes: Path, store: ArtifactStore, tmp_path: Path) -> None:
    first = source_digest(str(scenes), store)
    (tmp_path / "link").symlink_to(scenes)
    assert source_digest(str(tmp_path / "link"), store) == first
    (scenes / "sub" / "up").symlink_to(scenes / "sub")
    assert source_digest(str(scenes), store).files >= 2


def test_pipes_are_left_out(scenes: Path, store: ArtifactStore) -> None:
    first = source_digest(str(scenes), store)
    os.mkfifo(scenes / "pipe")
    assert source_digest(str(scenes), store) == first


def test_what_is_not_there_is_named(store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=rf"nothing is at data/scenes \(looked in {tmp_path}\)"):
        source_digest("data/scenes", store)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden").write_bytes(b"x")
    with pytest.raises(SourceError, match="there is no file in empty"):
        source_digest("empty", store)
    (tmp_path / "empty" / "dangling.jpg").symlink_to("nowhere")
    with pytest.raises(SourceError, match=r"dangling.jpg: it is not there \(a link that leads nowhere"):
        source_digest("empty", store)
    with pytest.raises(SourceError, match="ftp:// is no kind of source"):
        source_digest("ftp://host/x", store)


def test_a_name_that_is_no_text_does_not_count(store: ArtifactStore, tmp_path: Path) -> None:
    folder = tmp_path / "names"
    folder.mkdir()
    with open(os.fsencode(folder) + b"/\xff.jpg", "wb") as file:
        file.write(b"x")
    with pytest.raises(SourceError, match=r"there is no file in .*not UTF-8"):
        source_digest(str(folder), store)
    (folder / "a.jpg").write_bytes(b"x")
    assert source_digest(str(folder), store).files == 1


def test_a_source_that_keeps_changing_is_refused(
    scenes: Path, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = sources._Local.digest

    def growing(self: sources._Local, path: str) -> str:
        with open(scenes / "a.jpg", "ab") as file:
            file.write(b"more")
        return digest(self, path)

    monkeypatch.setattr(sources._Local, "digest", growing)
    with pytest.raises(SourceError, match="keeps changing while it is read"):
        source_digest(str(scenes), store)


def test_a_change_while_reading_is_read_again(
    scenes: Path, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = sources._Local.digest
    changes = iter([b"changed once"])

    def racing(self: sources._Local, path: str) -> str:
        found = digest(self, path)
        for content in changes:
            (scenes / path).write_bytes(content)
        return found

    monkeypatch.setattr(sources._Local, "digest", racing)
    found = source_digest(str(scenes), store)
    monkeypatch.undo()
    assert found == source_digest(str(scenes), ArtifactStore(str(scenes.parent / "another")))


def test_a_store_that_cannot_be_written_costs_only_the_memo(scenes: Path, store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert source_digest(str(scenes), ArtifactStore(str(tmp_path / "file"))) == source_digest(str(scenes), store)


def test_progress_counts_what_is_read(scenes: Path, store: ArtifactStore) -> None:
    seen: list[tuple[float, float, str]] = []
    source_digest(str(scenes), store, lambda done, total, unit: seen.append((done, total, unit)))
    assert seen == [(1, 2, "files"), (2, 2, "files")]


files = st.dictionaries(
    st.text("ab/", min_size=1, max_size=5).map(lambda n: f"n{n}"), st.binary(max_size=4), max_size=4
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files, files)
def test_digests_are_equal_exactly_when_contents_are(
    tmp_path_factory: pytest.TempPathFactory, one: dict[str, bytes], two: dict[str, bytes]
) -> None:
    def make(content: dict[str, bytes]) -> tuple[str, dict[str, bytes]] | None:
        folder = tmp_path_factory.mktemp("source")
        for name, data in content.items():
            path = folder / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            except OSError:  # "na" and "na/b" cannot both be files
                continue
            os.utime(path, (1, 1))
        made = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        store = ArtifactStore(str(tmp_path_factory.mktemp("store")))
        return (source_digest(str(folder), store).digest, made) if made else None

    first, second = make(one), make(two)
    if first and second:
        assert (first[0] == second[0]) == (first[1] == second[1])


# -- buckets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(s3_address: str) -> str:
    """The address of a prefix in a bucket with a few objects under it."""
    objects = Objects(s3_address)
    for key, body in {"in/a.jpg": b"first", "in/sub/b.jpg": b"second", "in/.hidden": b"x", "inner/c": b"y"}.items():
        objects.put(key, body)
    return s3_address


def test_a_bucket_prefix_has_the_digest_of_the_same_folder(
    bucket: str, scenes: Path, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = source_digest(f"{bucket}/in", store)
    assert found == source_digest(str(scenes), store)
    monkeypatch.setattr(sources._Bucket, "digest", lambda self, path: pytest.fail("read again"))
    assert source_digest(f"{bucket}/in/", store) == found


def test_one_object_of_a_bucket(bucket: str, scenes: Path, store: ArtifactStore) -> None:
    assert source_digest(f"{bucket}/in/a.jpg", store) == source_digest(str(scenes / "a.jpg"), store)


def test_a_bucket_without_the_prefix_and_no_bucket(bucket: str, store: ArtifactStore) -> None:
    with pytest.raises(SourceError, match=rf"nothing is at {bucket}/nowhere"):
        source_digest(f"{bucket}/nowhere", store)
    with pytest.raises(SourceError, match="no-such-bucket"):
        source_digest("s3://no-such-bucket/in", store)


def test_folders_that_a_console_has_made_are_no_files(
    bucket: str, scenes: Path, store: ArtifactStore, s3_environment: str
) -> None:
    name, _, prefix = bucket.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=s3_environment)
    for folder in ("in/", "in/sub/", "in/nothing yet/"):
        client.put_object(Bucket=name, Key=f"{prefix}/{folder}", Body=b"")
    client.put_object(Bucket=name, Key=f"{prefix}/in/empty", Body=b"")
    (scenes / "empty").write_bytes(b"")
    assert source_digest(f"{bucket}/in", store) == source_digest(str(scenes), store)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_bucket_that_fails_now_and_then_has_the_same_digest(
    bucket: str, scenes: Path, store: ArtifactStore, s3_environment: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(patience, "_LEAST_PAUSE", 0.01)
    with faulty_proxy(s3_environment) as proxy:
        proxy.plan = at_random(seed, 0.7)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        client_of.cache_clear()  # the fixture has one for this address, to the server itself
        assert source_digest(f"{bucket}/in", store) == source_digest(str(scenes), store)
        assert proxy.shown.total() > 1
