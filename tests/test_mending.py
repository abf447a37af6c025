"""Damaged, foreign and missing files in a record: found by checksum, named, never used, made again
or refused."""

import json
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest

from tests.world import differences
from utils.command import UserError
from utils.storage import checksums, mending
from utils.storage import record as module
from utils.storage.files import load_arrays, replacing, save_arrays, write_json
from utils.storage.record import Record

CONFIG = {"attack": "badnet", "epochs": 3, "device": "cpu"}
DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "flipped": lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
    "last bit": lambda content: content[:-1] + bytes([content[-1] ^ 128]),
    "empty": lambda content: b"",
    "another": lambda content: b"PK" + content,
}


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RECORDS", tmp_path / "record")
    return tmp_path / "record"


@pytest.fixture
def whole(world, tmp_path):
    """The finished record, to be damaged, and a copy of it, which is put back at the end."""
    folder = world.record("whole")
    shutil.copytree(folder, tmp_path / "copy")
    yield folder, tmp_path / "copy"
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)


def damage(path, kind):
    path.write_bytes(DAMAGE[kind](path.read_bytes()))


def made(name="run"):
    """A record with two finished stages, each with an array of its own."""
    record = Record(name)
    record.claim(CONFIG)
    for stage in ("one", "two"):
        with record.stage(stage):
            save_arrays(record / f"{stage}.npz", a=np.arange(9))
    return record


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_of_any_kind_is_refused_where_a_file_is_read(records, kind):
    record = made()
    damage(record / "one.npz", kind)
    with pytest.raises(
        UserError,
        match=r"one.npz: damaged or foreign \(its sha256 is none that .*checksums.txt lists\)",
    ):
        load_arrays(record / "one.npz")
    damage(record / "config.yaml", kind)
    damage(record / "stages.json", kind)
    for read in (record.config, record.finished):
        with pytest.raises(UserError, match="damaged or foreign"):
            read()


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_is_set_aside_and_its_stage_run_again(records, kind):
    record = made()
    good = (record / "one.npz").read_bytes()
    damage(record / "one.npz", kind)
    record.claim(CONFIG)
    assert list(record.finished()) == ["two"]
    assert not (record / "one.npz").exists()
    assert (record / "one.npz.damaged").read_bytes() == DAMAGE[kind](good)


def test_a_stage_that_comes_out_different_takes_later_ones_along(records):
    for content, left in ((np.arange(9), ["two", "one"]), (np.arange(1, 10), ["one"])):
        record = made(f"run{content[0]}")
        damage(record / "one.npz", "flipped")
        record.claim(CONFIG)
        with record.stage("one"):
            save_arrays(record / "one.npz", a=content)
        assert list(record.finished()) == left
        assert (record / "two.npz").exists() == ("two" in left)


def test_a_file_that_no_run_wrote_is_not_taken_for_a_result(records):
    record = made()
    np.savez(record / "three.npz", a=np.zeros(3))
    (record / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="three.npz: damaged or foreign"):
        load_arrays(record / "three.npz")
    record.claim(CONFIG)
    assert not (record / "three.npz").exists()
    assert (record / "notes.txt").exists()
    assert list(record.finished()) == ["one", "two"]


def test_a_missing_file_has_its_stage_run_again(records):
    record = made()
    (record / "two.npz").unlink()
    write_json(record / "report.json", {})
    record.claim(CONFIG)
    assert list(record.finished()) == ["one"]
    assert not (record / "report.json").exists()


def test_a_config_that_is_damaged_or_gone_cannot_be_made_again(records):
    for name, harm in (
        ("a", lambda path: damage(path, "flipped")),
        ("b", lambda path: path.unlink()),
    ):
        record = made(name)
        harm(record / "config.yaml")
        with pytest.raises(UserError, match="config.yaml: (damaged|missing).*restore it"):
            record.claim(CONFIG)
        assert (record / "one.npz").exists()


def test_between_the_checksum_and_the_rename_either_file_is_whole(records, monkeypatch):
    record = made()
    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save_arrays(record / "one.npz", a=np.zeros(5))
    assert load_arrays(record / "one.npz")["a"].tolist() == list(range(9))
    save_arrays(record / "one.npz", a=np.zeros(5))
    assert load_arrays(record / "one.npz")["a"].tolist() == [0] * 5


def test_a_list_is_read_once_for_all_its_files_and_again_when_it_has_changed(records, monkeypatch):
    record, times, read = made(), [], checksums.read
    monkeypatch.setattr(checksums, "read", lambda folder: times.append(folder) or read(folder))
    checksums.read(record.path).hashes.clear()  # the caller's own
    times.clear()
    for _ in range(5):
        load_arrays(record / "one.npz")
        load_arrays(record / "two.npz")
    assert len(times) <= 1
    save_arrays(record / "three.npz", a=np.arange(3))
    for _ in range(5):
        load_arrays(record / "three.npz")
    assert len(times) <= 2
    os.replace(record / checksums.FILE, record / "kept")
    (record / checksums.FILE).write_bytes(
        (record / "kept").read_bytes().replace(b"one.npz", b"ten.npz")
    )  # as long, but another file
    with pytest.raises(UserError, match="one.npz: damaged or foreign"):
        load_arrays(record / "one.npz")


def test_a_line_that_a_power_cut_left_unfinished_spoils_no_other(records):
    record = made()
    with open(record / checksums.FILE, "ab") as out:
        out.write(b"0123456789abcdef")
    write_json(record / "late.json", [1])
    mending.require_whole(record.path)


def test_file_checksum_and_rename_are_synced_in_this_order(records, monkeypatch):
    record, done, sync, rename = made(), [], os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: (
            done.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))) or sync(handle)
        ),
    )
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("rename") or rename(*paths))
    with replacing(record / "late.txt") as temporary:
        temporary.write_text("x")
    assert done == [f".late.{os.getpid()}.txt", checksums.FILE, "rename", "run"]


def test_a_record_older_than_checksums_is_taken_as_it_is(records, caplog, monkeypatch):
    record = made()
    (record / checksums.FILE).unlink()
    with pytest.raises(UserError, match="has no checksums.txt"):
        mending.require_whole(record.path)
    monkeypatch.setattr(module.log, "propagate", True)
    record.claim(CONFIG)
    assert "made before checksums were kept" in caplog.text
    assert list(record.finished()) == [
        "one",
        "two",
    ]
    mending.require_whole(record.path)
    damage(record / "one.npz", "last bit")
    with pytest.raises(UserError, match=r"not whole: one.npz \(damaged\)"):
        mending.require_whole(record.path)


def test_what_a_killed_run_left_half_written_goes(records):
    record = made()
    (record / ".one.4711.npz").write_bytes(b"half")
    (record / "purify").mkdir()
    (record / "purify" / ".block-0.4711.npz").write_bytes(b"half")
    record.claim(CONFIG)
    assert not (record / ".one.4711.npz").exists()
    assert not any((record / "purify").iterdir())


@pytest.mark.parametrize(
    "harmed",
    [
        ["victim.safetensors", "trigger.png", "decisions.csv", "benign_stage1.safetensors"],
        ["report.json", "stages.json"],
    ],
)
def test_a_finished_record_with_damage_is_made_whole_again(world, whole, harmed):
    folder, copy = whole
    for k, name in enumerate(harmed):
        damage(folder / name, list(DAMAGE)[k])
    with pytest.raises(UserError, match="not whole") as told:
        mending.require_whole(folder)
    assert all(f"{name} (damaged)" in str(told.value) for name in harmed)
    code, _ = world.run(folder.name)
    assert code == 0, world.said()
    assert all(f"{folder / name}: damaged" in world.said() for name in harmed)
    assert differences(copy, folder) == []
    mending.require_whole(folder)


def test_damaged_blocks_and_checkpoints_are_made_again_and_foreign_blocks_are_not_used(world):
    world.run("half", "--stop_after", "victim")
    folder, child = world.record("half"), world.start("half")
    while len(list(folder.glob("purify/block-*"))) < 3:
        assert os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    os.kill(child, signal.SIGKILL)
    world.finish(child)
    first, second, third = sorted((folder / "purify").glob("block-*.npz"))[:3]
    damage(first, "flipped")
    shutil.copy(third, second)
    (folder / "benign_stage1.checkpoint.pt").write_bytes(b"foreign")
    code, _ = world.run("half")
    said = world.said()
    assert code == 0, said
    assert f"{first}: damaged" in said
    assert f"{second}: damaged" in said
    assert "benign_stage1.checkpoint.pt: foreign" in said
    assert differences(world.record("whole"), folder) == []


def test_check_tells_what_a_record_holds(records, monkeypatch, capsys):
    record = made()
    record.claim(CONFIG)
    monkeypatch.setattr(sys, "argv", ["utils/storage/record.py", "check", "run"])
    module.main()
    told = capsys.readouterr().out
    assert re.search(r"finished stages: one \(0.\d+ s\), two \(0.\d+ s\)", told)
    assert f"in use by process {os.getpid()}" in told
    assert any(
        line.split() == ["whole", f"{(record / 'one.npz').stat().st_size:,}", "one", "one.npz"]
        for line in told.splitlines()
    )
    damage(record / "one.npz", "empty")
    (record / "two.npz").unlink()
    with pytest.raises(UserError, match=r"one.npz \(damaged\), two.npz \(missing\)"):
        module.main()
    told = capsys.readouterr().out
    assert "damaged" in told
    assert "missing" in told
    monkeypatch.setattr(sys, "argv", ["utils/storage/record.py", "chekc", "run"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_damaged_list_of_stages_in_odd_forms_is_told(records):
    for number, content in enumerate((b"[]", b"[" * 100000, b"\xff")):
        record = made(f"run{number}")
        (record / checksums.FILE).unlink()
        (record / "stages.json").write_bytes(content)
        with pytest.raises(UserError, match="stages.json: damaged"):
            record.finished()
        assert json.loads("[]") == []
        assert "not known" in mending.inventory(record.path)
