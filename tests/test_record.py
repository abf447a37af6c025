"""Records: names that stay inside, files that are whole or absent, and folders that belong to one
config."""

import json
import pickle
import re

import numpy as np
import pytest
import torch
import yaml

from utils.config import UserError
from utils.storage import record as module
from utils.storage.record import (
    DATA_KEY,
    RUNTIME_KEYS,
    Record,
    load_arrays,
    replacing,
    save_arrays,
    write_json,
)

CONFIG = {
    "attack": "badnet",
    "epochs": 3,
    "lr": 0.1,
    "pratio": 0.1,
    "device": "cpu",
    "purify_batch_size": 4,
    "ft_epochs": None,
}


@pytest.fixture(autouse=True)
def records(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RECORDS", tmp_path / "record")
    return tmp_path / "record"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../../x",
        "a/..",
        "/tmp/x",
        "a//b",
        "a/",
        ".hidden",
        "-x",
        "a b",
        "a\n",
        "a\x00",
        "a\\b",
        "~/x",
        "a/./b",
        "$HOME",
    ],
)
def test_names_that_are_no_folder_in_record_are_refused(records, name):
    with pytest.raises(
        UserError, match="(?s)save_folder_name: .* is no name for a folder in record/"
    ):
        Record(name)
    assert not records.exists()


def test_links_out_of_record_are_refused(records, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    records.mkdir()
    (records / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("link", "link/deeper"):
        with pytest.raises(UserError, match="leads out of record/ through a link"):
            Record(name)
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["a", "badnet_0-1.5", "a/defense/b", "_x", "0"])
def test_good_names_make_their_folder(records, name):
    assert Record(name).path == records / name
    assert (records / name).is_dir()
    assert Record(name) / "log.txt" == records / name / "log.txt"


def test_a_missing_record_is_answered_with_those_there_are(records):
    with pytest.raises(UserError, match="there is no .*; records: none yet"):
        Record("a", must_exist=True)
    Record("known").claim(CONFIG)
    Record("empty")
    with pytest.raises(
        UserError, match=rf"result_file: there is no {records}/knwon; records: known$"
    ):
        Record("knwon", must_exist=True)
    with pytest.raises(UserError, match="result_file: '../known' is no name"):
        Record("../known", must_exist=True)
    assert not (records / "knwon").exists()
    assert Record("known", must_exist=True).config()["epochs"] == 3


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "result.npz"
    path.write_text("old")
    for error, told in (
        (KeyboardInterrupt, KeyboardInterrupt),
        (ValueError, ValueError),
        (OSError, UserError),
    ):
        with pytest.raises(told), replacing(path) as temporary:  # noqa: PT012 the block is tested
            temporary.write_text("half")
            assert path.read_text() == "old"
            assert temporary.parent == path.parent
            assert temporary.suffix == path.suffix
            raise error
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["result.npz"]


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (lambda path: save_arrays(path, a=np.zeros(2)), UserError),
        (lambda path: write_json(path, {"a": object()}), TypeError),
        (lambda path: save_arrays(path.parent / "none" / path.name, a=np.zeros(2)), UserError),
    ],
)
def test_failed_writing_is_told_and_leaves_what_was_there(tmp_path, write, error, monkeypatch):
    path = tmp_path / "file.npz"
    path.write_text("old")
    monkeypatch.setattr(
        np,
        "savez",
        lambda file, **arrays: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(
        error,
        match="file.npz: could not be written .*No space left" if error is UserError else "JSON",
    ):
        write(path)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_arrays_come_back_as_they_were(tmp_path):
    tensors = {
        "images": torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2),
        "labels": torch.tensor([3, 1]),
        "mask": torch.tensor([True, False]),
        "none": torch.empty(0),
    }
    save_arrays(tmp_path / "a.npz", **tensors)
    found = load_arrays(tmp_path / "a.npz")
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype
        for key in tensors
    )


def test_damaged_arrays_are_refused_by_name(tmp_path):
    save_arrays(tmp_path / "a.npz", images=np.zeros(1000))
    whole = (tmp_path / "a.npz").read_bytes()
    for content in (b"", b"nothing", whole[:300], whole[:-40]):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(
            UserError, match=rf"{tmp_path}/a.npz: cannot be read .*delete it to have it made again"
        ):
            load_arrays(tmp_path / "a.npz")
    with pytest.raises(UserError, match="b.npz: cannot be read"):
        load_arrays(tmp_path / "b.npz")


def test_pickles_in_arrays_are_refused_and_do_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "made").mkdir, ()

    np.savez(tmp_path / "a.npz", images=np.array([Bomb()], dtype=object))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Bomb()))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            load_arrays(tmp_path / name)
    assert not (tmp_path / "made").exists()


def test_json_holds_no_nan(tmp_path):
    write_json(
        tmp_path / "a.json", {"a": float("nan"), "b": [1.5, float("-inf"), (True, None, "x")]}
    )
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "a": None,
        "b": [1.5, None, [True, None, "x"]],
    }


def claimed(name="run"):
    """A record that belongs to CONFIG and has a finished stage."""
    record = Record(name)
    record.claim(CONFIG)
    with record.stage("poison"):
        pass
    return record


def test_the_same_config_may_come_again_and_runtime_keys_may_differ():
    record = claimed()
    record.claim(CONFIG)
    assert {"device", "purify_batch_size"} <= set(RUNTIME_KEYS)
    assert not {
        "epochs",
        "lr",
        "random_seed",
        "amp",
        "pratio",
    } & set(RUNTIME_KEYS)
    record.claim(CONFIG | {"device": "cuda", "purify_batch_size": 256})
    kept = Record("run").config()
    assert {key: kept[key] for key in CONFIG if key not in RUNTIME_KEYS} == {
        key: CONFIG[key] for key in CONFIG if key not in RUNTIME_KEYS
    }
    assert {"torch", "python", "git_commit"} <= set(kept["environment"])


def test_another_config_is_refused_and_names_the_keys():
    record = claimed()
    before = (record / "config.yaml").read_bytes()
    with pytest.raises(
        UserError,
        match=re.escape(
            "belongs to another config (epochs: 3 there, 4 now; ft_epochs: None there, 2 now)"
        )
        + ".*save_folder_name",
    ):
        record.claim(CONFIG | {"epochs": 4, "ft_epochs": 2, "device": "cuda"})
    with pytest.raises(UserError, match="new_key: None there, 1 now"):
        record.claim(CONFIG | {"new_key": 1})
    assert (record / "config.yaml").read_bytes() == before


def test_other_images_are_refused_wherever_they_lie_and_a_record_older_than_the_key_goes_on():
    record = claimed()
    record.claim(CONFIG | {DATA_KEY: "a1"})
    record.claim(CONFIG | {DATA_KEY: "a1", "dataset_path": "/moved"})
    with pytest.raises(
        UserError, match="data_sha256: 'a1' there, 'b2' now: these are other images or labels"
    ):
        record.claim(CONFIG | {DATA_KEY: "b2"})


def test_a_damaged_config_is_refused_in_words():
    for number, text in enumerate(
        ("epochs: [", "- a\n", "epochs: !!python/object/apply:os.getcwd []")
    ):
        record = claimed(f"run{number}")
        (record / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=re.escape(str(record / "config.yaml"))):
            record.claim(CONFIG)
        with pytest.raises(UserError, match=re.escape(str(record / "config.yaml"))):
            record.config()


def test_stages_are_noted_once_they_end_well():
    record = Record("run")
    assert record.finished() == {}
    with pytest.raises(RuntimeError), record.stage("victim"):
        raise RuntimeError
    assert record.finished() == {}
    with record.stage("victim") as notes:
        notes["images"] = 7
    found = record.finished()
    assert list(found) == ["victim"]
    assert found["victim"]["images"] == 7
    assert found["victim"]["seconds"] >= 0
    with record.stage(
        "victim"
    ) as notes:  # its block runs, and finds its files there, but is not noted again
        notes["images"] = 8
    assert record.finished() == found
    with record.stage("purify"):
        pass
    assert list(Record("run").finished()) == ["victim", "purify"]


def test_the_time_of_interrupted_tries_is_added(monkeypatch):
    record, clock = Record("run"), iter([100.0, 107.5, 200.0, 201.0, 300.0, 300.25])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    for error in (KeyboardInterrupt, UserError):
        with pytest.raises(error), record.stage("purify"):
            raise error
    with record.stage("purify"):
        pass
    assert record.finished()["purify"]["seconds"] == 8.75
    assert [p.name for p in record.path.iterdir()] == ["stages.json"]


def test_a_time_that_a_full_disk_cut_short_is_forgotten():
    record = Record("run")
    (record / ".purify.partial").write_text("")
    with record.stage("purify"):
        pass
    assert "purify" in record.finished()


def test_a_damaged_list_of_stages_is_refused_in_words():
    record = claimed()
    for text in ("{", "", "nonsense"):
        (record / "stages.json").write_text(text)
        with pytest.raises(UserError, match="stages.json: damaged"):
            record.finished()


def test_a_record_of_an_interrupted_claim_can_be_taken_by_any_config(records):
    Record("run").claim(CONFIG)
    Record("run").claim(CONFIG | {"epochs": 9})
    assert yaml.safe_load((records / "run" / "config.yaml").read_text())["epochs"] == 9


def test_a_record_with_half_a_stage_belongs_to_its_config():
    record = Record("run/defense/again")
    record.claim(CONFIG)
    with pytest.raises(KeyboardInterrupt), record.stage("purify"):  # noqa: PT012 as a stage is
        (record / "purify").mkdir()
        (record / "purify" / "block-0000000-0000004.npz").touch()
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="belongs to another config"):
        record.claim(CONFIG | {"epochs": 9})
