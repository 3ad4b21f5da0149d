"""Addresses, files on a disk and in a bucket, credentials, and what the user is told when a store fails."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import StoreError
from pipeline.store.address import mask
from pipeline.store.failures import explain
from pipeline.store.objects import Conflict, Objects
from pipeline.store.store import ArtifactStore

AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SKIP_SIGNATURE", "AWS_ENDPOINT_URL", "AWS_PROFILE")


def test_addresses_have_one_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ArtifactStore("store").address == str(tmp_path / "store")
    assert ArtifactStore(f"file://{tmp_path}/a%20store/").address == f"{tmp_path}/a store"
    assert ArtifactStore("s3://bucket/some/prefix/").address == "s3://bucket/some/prefix"
    assert ArtifactStore("gs://bucket").objects.join("a/b") == "gs://bucket/a/b"
    assert not (tmp_path / "store").exists()  # opening touches nothing


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", "the address is empty"),
        ("ftp://host/x", r"ftp:// is no kind of store \(use a folder, file://, s3://, gs://, az://\)"),
        ("s3:///prefix", r"the bucket's name is missing \(write s3://bucket/prefix\)"),
        (
            "s3://KEY:hunter2@bucket/x",
            r"s3://\*\*\*@bucket/x: an address may not carry credentials .*AWS_ACCESS_KEY_ID",
        ),
        ("az://bucket/x?sig=hunter2", r"az://bucket/x\?\*\*\*: an address may not carry credentials .*AZURE_STORAGE"),
    ],
)
def test_what_is_no_address_is_refused_and_secrets_stay_hidden(address: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as error:
        ArtifactStore(address)
    assert "hunter2" not in str(error.value)


def test_secrets_are_masked() -> None:
    assert mask("postgresql://user:hunter2@host/db?password=hunter2") == "postgresql://***@host/db?***"
    assert mask("s3://bucket/prefix") == "s3://bucket/prefix"


def test_credentials_are_never_pickled_or_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEYID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    store = ArtifactStore("s3://bucket/prefix")
    assert b"hunter2" not in pickle.dumps(store)
    assert "hunter2" not in repr(store) + repr(store.objects)


def test_a_local_store_below_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    store = ArtifactStore(tmp_path / "file" / "store")
    assert store.find("encoder", "abc") is None
    with pytest.raises(StoreError, match=f"store {store.address}: cannot write .*not a folder .name a folder"):
        store.probe_writable()
    with pytest.raises(StoreError, match="name a folder"), store.lease("encoder", "abc"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_local_store_without_permission_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match=r"this user may not write there \(change its owner or its mode"):
        ArtifactStore(tmp_path).probe_writable()
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("cause", "remedy"),
    [
        (OSError(28, "No space left on device"), "MiB free (free space"),
        (OSError(30, "Read-only file system"), "its file system is read-only (name a store"),
        (OSError(13, "Permission denied"), "this user may not write there (change its owner"),
        (Exception("Unable to open file: Permission denied (os error 13)"), "this user may not write there"),
        (OSError(5, "Input/output error"), "the disk reports an error (check the disk"),
        (Exception("something new\nDebug source: ..."), "something new (`tessera doctor` checks the store)"),
    ],
)
def test_causes_on_a_disk_have_remedies(cause: Exception, remedy: str) -> None:
    message = str(explain(cause, "/data/store", "write", "encoder/abc/manifest.json"))
    assert message.startswith("store /data/store: cannot write encoder/abc/manifest.json: ")
    assert remedy in message
    assert "Debug" not in message


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [
        (
            "403 Forbidden: <Code>RequestTimeTooSkewed</Code>",
            "this machine's clock differs from the server's by too much",
        ),
        ("403 Forbidden: <Code>AccessDenied</Code>", "access is denied (check AWS_ACCESS_KEY_ID"),
        ("501 Not Implemented", "the server does not know conditional writes"),
        ("503 Service Unavailable: <Code>SlowDown</Code>", "it asks for fewer requests, or is overloaded"),
        ("500 Internal Server Error", "the server fails (status 5xx) (ask who runs it"),
    ],
)
def test_answers_of_a_bucket_have_remedies(answer: str, remedy: str) -> None:
    cause = Exception(
        f"Generic S3 error: Error performing PUT http://host - Server returned non-2xx status code: {answer}"
    )
    assert remedy in str(explain(cause, "s3://bucket/store", "write", "encoder/abc/manifest.json"))


def test_a_missing_bucket_is_not_an_empty_store(s3_environment: str) -> None:
    store = ArtifactStore("s3://no-such-bucket/prefix")
    rule = r"store s3://no-such-bucket/prefix: cannot .*there is no such bucket \(create the bucket, or correct"
    for use in (
        lambda: store.find("encoder", "abc"),
        lambda: list(store.artifacts()),
        lambda: store.begin("encoder", "abc"),
        store.probe_writable,
    ):
        with pytest.raises(StoreError, match=rule):
            use()


def test_missing_credentials_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in AWS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"there are no credentials for it \(set AWS_ACCESS_KEY_ID"):
        ArtifactStore("s3://bucket/no-credentials").find("encoder", "abc")
    assert time.monotonic() - began < 3


def test_credentials_of_a_profile_are_used(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in AWS:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = testing\naws_secret_access_key = test%ing\n")
    (tmp_path / "config").write_text("[profile mine]\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    ArtifactStore("s3://tessera-test/profile").probe_writable()


def test_credentials_that_come_from_a_program_are_used(
    s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in AWS:
        monkeypatch.delenv(name, raising=False)
    keys = '{"Version": 1, "AccessKeyId": "testing", "SecretAccessKey": "testing"}'
    (tmp_path / "keys.json").write_text(keys)
    (tmp_path / "config").write_text(f"[default]\nregion = us-east-1\ncredential_process = cat {tmp_path}/keys.json\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    ArtifactStore("s3://tessera-test/program").probe_writable()


def test_a_profile_that_does_not_exist_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in AWS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreError, match=r"cannot be used: .*nobody.* \(correct AWS_PROFILE"):
        ArtifactStore("s3://bucket/no-profile").find("encoder", "abc")


def test_a_server_without_create_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(tmp_path)
    plain = store.objects.put
    monkeypatch.setattr(store.objects, "put", lambda path, data, create=False: plain(path, data))
    with pytest.raises(StoreError, match="overwrites an object that was to be created"):
        store.probe_writable()


@pytest.fixture(params=["local", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    return Objects(str(tmp_path / "o") if request.param == "local" else request.getfixturevalue("s3_address"))


def test_objects_behave_alike_on_a_disk_and_in_a_bucket(objects: Objects, tmp_path: Path) -> None:
    assert objects.walk("a") == []
    assert objects.folders() == []
    assert objects.get("a/b") is None
    objects.delete(["a/b"])
    objects.delete_folder("a")

    tag = objects.put("a/b", b"one")
    (found,) = objects.walk("a")
    assert (found.path, found.size, found.tag) == ("a/b", 3, tag)
    assert objects.put("a/b", b"two") != tag
    with pytest.raises(Conflict):
        objects.put("a/b", b"three", create=True)
    assert objects.get("a/b") == b"two"

    big = os.urandom(12_000_000)  # uploaded in several pieces
    (tmp_path / "big").write_bytes(big)
    objects.put("a/big", tmp_path / "big")
    tag = objects.put_moved("a/moved", tmp_path / "big")
    assert not (tmp_path / "big").exists()
    assert b"".join(objects.stream("a/big")) == objects.get("a/moved") == big
    assert [found.tag for found in objects.walk("a") if found.path == "a/moved"] == [tag]
    with pytest.raises(FileNotFoundError):
        list(objects.stream("a/nothing"))

    objects.put("ab/c", b"")
    assert objects.folders() == ["a", "ab"]
    assert [found.path for found in objects.walk("a")] == ["a/b", "a/big", "a/moved"]  # "ab" is another folder
    objects.delete_folder("a")
    assert [found.path for found in objects.walk()] == ["ab/c"]


def test_a_conditional_put_needs_the_current_tag(s3_address: str) -> None:
    objects = Objects(s3_address)
    objects.put("lease", b"one")
    seen = objects.get_tagged("lease")
    assert seen is not None
    objects.put_if("lease", b"two", seen[1])
    with pytest.raises(Conflict):
        objects.put_if("lease", b"three", seen[1])
    assert objects.get("lease") == b"two"


def test_importing_the_store_imports_nothing_heavy() -> None:
    heavy = ("torch", "ray", "mlflow", "pandas", "pyarrow", "numpy", "obstore", "boto3", "cv2")
    script = f"import pipeline.store.store, sys; print([name for name in {heavy!r} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert printed.stdout == "[]\n"
