"""Records that are defended again: whose keys count, and where the result goes."""

import sys

import pytest

from attack.badnet import BadNet
from attack.poisoning.command import main
from defense.harness.command import read_order
from defense.harness.run import defend_again
from utils.config import UserError
from utils.images.data import Dataset
from utils.storage import record


@pytest.fixture
def again(tmp_path, monkeypatch):
    """Defends a record of the digits' config without a victim; gives its defences' configs.

    The record was made for the defence `none`.
    """
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    main(
        BadNet,
        [
            "--yaml_path",
            "../config/badnet/digits.yaml",
            "--save_folder_name",
            "x",
            "--stop_after",
            "poison",
            "--defense",
            "none",
        ],
    )

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", ["again", "--result_file", "x", *words])
        with pytest.raises(
            UserError, match="result_file: x has no victim yet; run the command that made it"
        ):
            defend_again(read_order(name))
        return [
            record.Record(f"x/defense/{path.name}").config()
            for path in sorted((tmp_path / "x" / "defense").iterdir())
        ]

    return run


def test_keys_of_the_config_file_reach_every_defence_whichever_the_record_was_made_for(again):
    (config,) = again("dataelixir")
    assert (config["steps_T"], config["rounds_n"], config["last_steps_m"], config["ft_epochs"]) == (
        200,
        3,
        10,
        5,
    )
    assert [c["steps_T"] for c in again("purify_only", "--steps_T", "60", "--run_name", "zz")] == [
        200,
        60,
    ]


def test_keys_that_come_from_the_record_are_told(again, tmp_path):
    """A record keeps the defaults of the day on which it was made."""
    again("dataelixir", "--steps_T", "60", "--run_name", "y")
    [told] = [
        line
        for line in (tmp_path / "x" / "defense" / "y" / "log.txt").read_text().splitlines()
        if "today's defaults" in line
    ]
    assert "rounds_n 3" in told
    assert "reverse_steps 17" in told
    assert "steps_T 200" not in told
    assert "epochs" not in told.replace("ft_epochs", "")


def test_keys_that_decide_nothing_open_no_other_folder(again):
    """Who is told to take a smaller batch wants to go on, and not to purify from the start."""
    assert (
        len(again("dataelixir"))
        == len(again("dataelixir", "--purify_batch_size", "7", "--frequency_save", "3"))
        == 1
    )
    assert len(again("dataelixir", "--steps_T", "60")) == 2


def test_other_images_than_the_record_was_made_from_are_refused(again, monkeypatch):
    """The test set is read anew, and a model is no better for being measured on another one."""
    monkeypatch.setattr(Dataset, "digest", lambda self: "another")
    monkeypatch.setattr(sys, "argv", ["again", "--result_file", "x"])
    with pytest.raises(
        UserError,
        match="dataset_path: .* are others than those that record x was made from",
    ):
        defend_again(read_order("dataelixir"))


def test_a_folder_of_other_keys_is_blamed_on_the_flag_that_names_it(again, tmp_path, monkeypatch):
    """There is no --save_folder_name here."""
    again("dataelixir", "--run_name", "mine")
    record.save_arrays(record.Record("x/defense/mine") / "votes.npz", votes=[0])
    for words, told in (
        (
            ["mine", "--steps_T", "60"],
            "^run_name: .*mine belongs to another config .*; give another --run_name, or delete",
        ),
        (["a b"], "^run_name: '.*a b' is no name for a folder in record/"),
        (["../../y"], "^run_name: "),
    ):
        monkeypatch.setattr(sys, "argv", ["again", "--result_file", "x", "--run_name", *words])
        with pytest.raises(UserError, match=told) as refused:
            defend_again(read_order("dataelixir"))
        assert "save_folder_name" not in str(refused.value)
