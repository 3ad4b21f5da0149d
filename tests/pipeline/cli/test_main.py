"""The command line as a user or a program sees it: exit codes, JSON on standard output, speed."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import registry
from pipeline.store.artifact import Artifact, Damage
from pipeline.store.store import ArtifactStore
from tests.pipeline.workshop import Workshop, timed


@pytest.fixture
def done(workshop: Workshop) -> Workshop:
    """A workshop whose pipeline has run."""
    workshop.tessera("run", "p.yaml")
    return workshop


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[random.randrange(len(data))] ^= 64
    file.write_bytes(bytes(data))


def files_of(workshop: Workshop, kind: str) -> list[Path]:
    return sorted(path for path in (workshop.folder / "store" / kind).rglob("*") if path.is_file())


def test_help_needs_little_time() -> None:
    command = [str(Path(sys.executable).with_name("tessera")), "--help"]
    shown, seconds = min((timed(command) for _ in range(5)), key=lambda run: run[1])
    assert all(verb in shown for verb in ("run", "plan", "artifacts", "lineage", "export", "schema", "doctor"))
    assert seconds < 0.3


def test_help_imports_nothing_heavy() -> None:
    heavy = ("rich", "pydantic", "ray", "torch", "mlflow", "numpy", "pyarrow", "obstore", "yaml")
    code = f"import sys, pipeline.cli.main; print([m for m in {heavy!r} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_plan_json_has_the_documented_shape(workshop: Workshop) -> None:
    plan = workshop.json("plan", "p.yaml")
    assert plan.keys() == {"pipeline", "stages"}
    keys = {"name", "uses", "kind", "fingerprint", "state", "reasons", "inputs"}
    assert all(stage.keys() == keys for stage in plan["stages"])
    assert [stage["name"] for stage in plan["stages"]] == ["numbers", "scaled", "encoder", "score"]
    assert plan["stages"][3]["inputs"] == {"of": "encoder"}
    assert {stage["state"] for stage in plan["stages"]} == {"run"}
    assert workshop.ran == []


def test_run_json_has_states_artifacts_and_metrics(workshop: Workshop) -> None:
    first = workshop.json("run", "p.yaml")
    assert [stage["state"] for stage in first["stages"]] == ["done"] * 4
    assert all(Path(stage["artifact"]).is_dir() and stage["seconds"] > 0 for stage in first["stages"])
    assert first["stages"][3]["metrics"] == {"bytes": 3.0}
    assert "metrics" not in first["stages"][0]
    again = workshop.json("run", "p.yaml")
    assert [stage["state"] for stage in again["stages"]] == ["cached"] * 4
    assert again["stages"][3]["metrics"] == {"bytes": 3.0}
    assert [stage["artifact"] for stage in again["stages"]] == [stage["artifact"] for stage in first["stages"]]


def test_a_setting_changes_what_depends_on_it_only(done: Workshop) -> None:
    plan = done.json("plan", "p.yaml", "--set", "stages.encoder.width=4")
    assert {s["name"]: s["reasons"] for s in plan["stages"] if s["state"] == "run"} == {
        "encoder": ["stages.encoder.width 3 -> 4"],
        "score": ["input encoder changed"],
    }
    assert set(done.states("plan", "p.yaml", "--set", "stages.scaled.resources.cpus=1").values()) == {"cached"}


def test_selections(done: Workshop) -> None:
    assert done.states("run", "p.yaml", "--only", "scaled", "--force", "scaled") == {
        "numbers": "cached",
        "scaled": "done",
    }
    assert done.states("run", "p.yaml", "--from", "encoder", "--set", "stages.encoder.width=5") == {
        "scaled": "cached",
        "encoder": "done",
        "score": "done",
    }


def test_nothing_but_json_on_standard_output(workshop: Workshop) -> None:
    result = workshop.outside("run", "p.yaml", "--json")
    assert json.loads(result.stdout)["pipeline"] == "p"
    assert "a library says hello" in result.stderr  # what a stage and its libraries print
    assert "a child says hello" in result.stderr


def test_usage_errors_exit_with_2(workshop: Workshop, tmp_path: Path) -> None:
    for arguments in (
        ["run"],
        ["run", "p.yaml", "--nonsense"],
        ["nonsense"],
        ["run", "missing.yaml"],
        ["run", "p.yaml", "--set", "stages.scaled.faktor=3"],
        ["run", "p.yaml", "--set", "stages.scaled.numbers=score"],
        ["run", "p.yaml", "--only", "nobody"],
        ["plan", "p.yaml", "--set", "stages.numbers.source=nowhere.txt"],
        ["artifacts", "gc", "--unused", "--store", "store"],
        ["export", "numbers", "p.yaml", "--to", "out", "--store", "empty", "extra"],
    ):
        result = workshop.tessera(*arguments, code=2)
        assert result.stdout == ""
        assert "Traceback" not in result.stderr, result.stderr
    assert workshop.ran == []


def test_a_failed_stage_exits_with_1_and_still_prints_the_run(workshop: Workshop) -> None:
    result = workshop.tessera("run", "p.yaml", "--set", "stages.scaled.fail=purpose", "--json", code=1)
    stages = json.loads(result.stdout)["stages"]
    assert [stage["state"] for stage in stages] == ["done", "failed", "run", "run"]
    assert stages[1]["error"] == "the numbers are too odd (take even ones)"
    assert "stage 'scaled' failed: the numbers are too odd" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bug_in_a_stage_shows_its_traceback(workshop: Workshop) -> None:
    result = workshop.tessera("run", "p.yaml", "--set", "stages.scaled.fail=bug", code=1)
    assert "stage 'scaled' failed: ZeroDivisionError: a bug" in result.stderr
    assert "tessera_fakes.py" in result.stderr


def test_artifacts_ls_and_show(done: Workshop) -> None:
    rows = done.json("artifacts", "ls", "p.yaml")
    keys = {"kind", "fingerprint", "stage", "bytes", "rows", "created", "address"}
    assert all(row.keys() == keys for row in rows)
    assert [row["stage"] for row in rows] == ["numbers", "scaled", "encoder", "score"]
    assert sorted(r["address"] for r in done.json("artifacts", "ls", "--store", "store")) == sorted(
        r["address"] for r in rows
    )
    shown = done.tessera("artifacts", "show", "p.yaml", "encoder").stdout
    assert "made by stage 'encoder' (fake_encoder, version 1)" in shown
    preview = next(path for path in files_of(done, "encoder") if path.name.startswith("preview."))
    assert str(preview) in shown
    assert "line 9: not a number" in done.tessera("artifacts", "show", "numbers", "p.yaml").stdout
    address = rows[2]["address"]
    (by_address,) = done.json("artifacts", "show", address)
    (by_start,) = done.json("artifacts", "show", f"encoder/{rows[2]['fingerprint'][:6]}", "--store", "store")
    assert by_address == by_start
    assert by_address["inputs"] == {"numbers": f"numbers/{rows[1]['fingerprint']}"}
    assert "nothing in" in done.tessera("artifacts", "show", "nobody", "p.yaml", code=1).stderr


def test_verify_names_a_flipped_byte_in_any_file(done: Workshop) -> None:
    assert done.json("artifacts", "verify", "p.yaml") == {"checked": 4, "damaged": [], "notes": []}
    for kind in ("numbers", "encoder", "metrics"):
        for file in files_of(done, kind):
            good = file.read_bytes()
            flip(file)
            for target in (["p.yaml"], ["--store", "store"]):
                report = done.json("artifacts", "verify", *target, code=1)
                assert [damage["file"] for damage in report["damaged"]] == [file.name]
                assert report["damaged"][0]["artifact"] == f"{kind}/{file.parent.name}"
                assert report["checked"] == 4
            file.write_bytes(good)


def test_damaged_records_of_the_store_are_named_and_change_nothing(done: Workshop) -> None:
    before = done.json("plan", "p.yaml")
    records = sorted((done.folder / "store" / ".tessera").rglob("*.json"))
    assert len(records) >= 4 + 4 + 2  # history and memo of four stages, the source's digest and files
    for record in records:
        good = record.read_bytes()
        flip(record)
        report = done.json("artifacts", "verify", "p.yaml")
        assert report["damaged"] == []
        assert [row["file"].rsplit("/", 1)[1] for row in report["notes"]] == [record.name]
        flip(record)
        assert done.json("plan", "p.yaml") == before
        record.write_bytes(good)


def test_a_damaged_artifact_is_planned_and_made_again(done: Workshop) -> None:
    for victim in ("metrics.", "manifest."):
        file = next(path for path in files_of(done, "metrics") if path.name.startswith(victim))
        flip(file)
        plan = {stage["name"]: stage for stage in done.json("plan", "p.yaml")["stages"]}
        assert plan["score"]["state"] == "run"
        assert plan["score"]["reasons"] == [f"artifact damaged: {file.name}"]
        assert done.states("run", "p.yaml") == {
            "numbers": "cached",
            "scaled": "cached",
            "encoder": "cached",
            "score": "done",
        }
        assert done.json("artifacts", "verify", "p.yaml")["damaged"] == []


def test_verify_finds_artifacts_when_the_source_is_gone(done: Workshop) -> None:
    (done.folder / "numbers.txt").unlink()
    assert done.json("artifacts", "verify", "p.yaml")["checked"] == 4
    assert len(done.json("artifacts", "ls", "p.yaml")) == 4
    assert done.json("lineage", "score", "p.yaml")["nodes"]


GC = ("artifacts", "gc", "p.yaml", "--unused", "--older-than", "0")


def test_gc_removes_what_the_pipeline_itself_no_longer_needs(done: Workshop) -> None:
    done.tessera("run", "p.yaml", "--set", "stages.encoder.width=4")
    assert len(done.json("artifacts", "ls", "--store", "store")) == 6
    would = done.json(*GC, "--dry-run")
    assert len(done.json("artifacts", "ls", "--store", "store")) == 6
    gone = done.json(*GC, "--yes")
    assert [row["path"] for row in would["removed"]] == [row["path"] for row in gone["removed"]]
    assert set(done.states("plan", "p.yaml").values()) == {"cached"}
    assert len(done.json("artifacts", "ls", "--store", "store")) == 4


def test_gc_leaves_what_another_pipeline_made_or_used(done: Workshop) -> None:
    """q.yaml shares the first stage with p.yaml and has an encoder of its own; then p.yaml changes its source."""
    text = (done.folder / "p.yaml").read_text()
    (done.folder / "q.yaml").write_text(text.replace("numbers: scaled}", "numbers: scaled, width: 7}"))
    done.tessera("run", "q.yaml")
    (done.folder / "numbers.txt").write_text("4\n5\n")
    found = done.json(*GC, "--dry-run")
    assert {row["path"].split("/")[0] for row in found["removed"]} == {"encoder", "metrics"}  # of p alone
    assert {row["reason"].rpartition(" by ")[0] for row in found["kept"]} == {"used by pipeline 'q'"}
    assert len(found["kept"]) == 4  # numbers, scaled: used by q; encoder, metrics: made by it
    both = done.json("artifacts", "gc", "p.yaml", "q.yaml", "--unused", "--older-than", "0", "--dry-run")
    assert len(both["removed"]) == 6
    asked = done.json(*GC, "--also-others", "--dry-run")
    assert len(asked["removed"]) == 6
    assert {row["made_by"].split(" by ")[0] for row in asked["removed"]} >= {"stage 'encoder' of pipeline 'q'"}
    shown = done.tessera(*GC, "--yes").stdout
    assert "stage 'encoder' of pipeline 'p' by " in " ".join(shown.split())
    assert "no pipeline needs" not in shown
    assert "kept: 4 artifacts, used by pipeline 'q' by " in shown
    (done.folder / "numbers.txt").write_text("1\n2\n3\n")
    assert set(done.states("plan", "q.yaml").values()) == {"cached"}


def test_gc_keeps_another_users_artifacts_of_a_pipeline_with_the_same_name(
    done: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "ann")
    done.tessera("run", "p.yaml", "--set", "stages.encoder.width=4")
    monkeypatch.setenv("LOGNAME", "bob")
    found = done.json(*GC, "--dry-run")
    assert found["removed"] == []
    assert any(row["reason"].startswith("used by pipeline 'p' by ann@") for row in found["kept"])


def test_gc_asks_before_it_removes_artifacts(done: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    done.tessera("run", "p.yaml", "--set", "stages.encoder.width=4")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert "--yes" in done.tessera(*GC, code=2).stderr  # no terminal: nobody can be asked
    assert len(done.json("artifacts", "ls", "--store", "store")) == 6
    for answer, code, left in (("n\n", 1, 6), ("y\n", 0, 4)):
        terminal = io.StringIO(answer)
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        monkeypatch.setattr("sys.stdin", terminal)
        done.tessera(*GC, code=code)
        assert len(done.json("artifacts", "ls", "--store", "store")) == left


def test_gc_leaves_what_is_pinned(done: Workshop) -> None:
    done.tessera("run", "p.yaml", "--set", "stages.encoder.width=4")
    wide = next(row for row in done.json("artifacts", "ls", "--store", "store") if row["stage"] == "encoder")
    for row in done.json("artifacts", "ls", "--store", "store"):
        done.tessera("artifacts", "pin", row["address"])
    assert done.json(*GC, "--yes")["removed"] == []
    assert "pinned" in done.tessera("artifacts", "show", wide["address"]).stdout
    for row in done.json("artifacts", "ls", "--store", "store"):
        done.tessera("artifacts", "pin", row["address"], "--undo")
    assert len(done.json(*GC, "--yes")["removed"]) == 2


def test_gc_while_a_run_goes_on_keeps_what_it_reads_and_writes(done: Workshop) -> None:
    """The run has other settings than the file that gc is given, so that by the file alone its inputs are unused."""
    (done.folder / "numbers.txt").write_text("7\n")
    done.hold.touch()
    going_on = done.start("run", "p.yaml", "--json")
    while len(done.ran) < 6:
        time.sleep(0.02)  # four stages of `done`, then numbers and scaled of this run
    (done.folder / "numbers.txt").write_text("1\n2\n3\n")
    found = done.json(*GC, "--yes")
    assert found["removed"] == []
    assert [row["reason"] for row in found["kept"]] == ["a run that goes on needs it"]
    assert done.json("artifacts", "verify", "--store", "store") == {"checked": 5, "damaged": [], "notes": []}
    done.hold.unlink()
    _, errors = going_on.communicate(timeout=60)
    assert going_on.returncode == 0, errors
    assert done.json(*GC, "--dry-run")["kept"] == []


def test_verify_does_not_call_an_artifact_damaged_that_is_replaced_meanwhile(
    done: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify, replaced = ArtifactStore.verify, []

    def replace_first(store: ArtifactStore, artifact: Artifact, *rest: Any) -> list[Damage]:
        if artifact.kind == "metrics" and not replaced:
            replaced.append(artifact)
            done.tessera("run", "p.yaml", "--force", "score")
            store.objects.delete([f"{artifact.name}/{artifact.manifest.files[0].stored}"])  # as seen half-way through
            found = verify(store, artifact, *rest)
            done.tessera("run", "p.yaml", "--force", "score")
            return found
        return verify(store, artifact, *rest)

    monkeypatch.setattr(ArtifactStore, "verify", replace_first)
    assert done.json("artifacts", "verify", "p.yaml") == {"checked": 4, "damaged": [], "notes": []}
    assert replaced


def test_export_copies_plain_names_and_overwrites_nothing(done: Workshop) -> None:
    done.tessera("export", "encoder", "p.yaml", "--to", "out")
    out = done.folder / "out"
    assert sorted(path.name for path in out.iterdir()) == ["encoder.json", "encoder.safetensors"]
    assert (out / "encoder.safetensors").read_bytes() == bytes([2, 4, 6])
    again = done.tessera("export", "encoder", "p.yaml", "--to", "out", code=2).stderr
    assert "--to out: the folder is not empty, it holds encoder.json, encoder.safetensors (name another" in again
    refused = done.tessera("export", "scaled", "p.yaml", "--to", "out2", code=2).stderr
    assert (
        "a stage of type fake_scaled exports nothing (name the artifact of a stage that uses encoder or fake_encoder"
        in refused
    )
    file = next(path for path in files_of(done, "encoder") if path.suffix == ".safetensors")
    flip(file)
    assert file.name in done.tessera("export", "encoder", "p.yaml", "--to", "out3", code=1).stderr
    assert not (done.folder / "out3").exists()


def test_artifacts_of_a_type_that_is_not_installed_are_listed_verified_and_exported_whole(
    done: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    registry._entries.cache_clear()
    rows = {row["stage"]: row for row in done.json("artifacts", "ls", "--store", "store")}
    assert len(rows) == 4
    assert done.json("artifacts", "verify", "--store", "store")["checked"] == 4
    shown = done.tessera("export", rows["encoder"]["address"], "--to", "out")
    assert "'fake_encoder' is not installed here: all files are copied" in shown.stderr
    held = {"encoder.json", "encoder.safetensors", "preview.png"}
    assert {path.name for path in (done.folder / "out").iterdir()} == held
    assert len(shown.stdout.splitlines()) == 3


def test_lineage_walks_back_to_the_source_and_forward(done: Workshop) -> None:
    done.tessera("run", "p.yaml", "--set", "stages.encoder.width=4")  # a second encoder, which is not part of it
    graph = done.json("lineage", "score", "p.yaml")
    assert [node["stage"] or node["id"] for node in graph["nodes"]] == [
        "score",
        "encoder",
        "scaled",
        "numbers",
        "source:numbers.txt",
    ]
    assert {(edge["from"].split("/")[0], edge["field"]) for edge in graph["edges"]} == {
        ("encoder", "of"),
        ("numbers", "numbers"),
        ("source:numbers.txt", "source"),
    }
    forward = done.json("lineage", "scaled", "p.yaml")
    assert len([node for node in forward["nodes"] if node["kind"] == "metrics"]) == 2
    drawn = done.tessera("lineage", "score", "p.yaml").stdout
    assert all(word in drawn for word in ("score", "encoder", "scaled", "numbers.txt"))


def test_schema_is_a_json_schema(workshop: Workshop) -> None:
    schema = json.loads(workshop.tessera("schema").stdout)
    assert schema["type"] == "object"
    assert "fake_scaled" in json.dumps(schema)


def test_the_console_script_returns_the_code(workshop: Workshop) -> None:
    assert "there is no such pipeline file" in workshop.outside("plan", "nowhere.yaml", code=2).stderr
