"""A run that is not finished: its page says so and no verdict, and its log says what is known and how long the rest takes."""

import re
from html import unescape

import pytest

from defense import purify
from defense.elixir import assessment
from defense.harness.defense import find_defense
from defense.own_data import cleaning
from defense.own_data.under_way import WatchedFolder
from tests.cleaning import CHOSEN, KEYS, POISONED, run, use_exact_networks, write_folder
from tests.toys import toy_dataset
from utils.overall import Stage
from utils.page.record_page import PAGE
from utils.storage.record import Record

CLEAN = toy_dataset(per_class=20).train
VERDICTS = ("No backdoor", "no backdoor", "A backdoor was found", 'id="verdict"')


class Killed(BaseException):
    """What no code of ours catches."""


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """killed(data, stage, before): runs until that stage begins, or is over; gives the output folder."""
    use_exact_networks(monkeypatch)

    def run_until(data, stage, before=True):
        out, whole = tmp_path / "out", WatchedFolder.stage

        def stop(self, name):
            if name == stage and before:
                raise Killed
            return whole(self, name)

        def over(self, line):
            write(self, line)
            if stage in self.finished():
                raise Killed

        write = WatchedFolder._write_page
        with monkeypatch.context() as patch:
            patch.setattr(WatchedFolder, "stage", stop)
            if not before:
                patch.setattr(WatchedFolder, "_write_page", over)
            words = ["--data", str(write_folder(data, tmp_path / "set")), "--out", str(out)]
            with pytest.raises(Killed):
                purify.main([*words, *KEYS])
        return out

    return run_until


def shown(page):
    return unescape(re.sub("<style>.*</style>", "", page, flags=re.DOTALL))


@pytest.mark.parametrize(("data", "stage"), [(POISONED, "purify"), (CLEAN, "purify"), (POISONED, "stage1"),
                                             (POISONED, "finetune"), (POISONED, "report"), (CLEAN, "report")])  # fmt: skip
def test_a_run_stopped_between_stages_has_a_page_that_is_no_verdict(killed, data, stage):
    out = killed(data, stage)
    page = shown((out / PAGE).read_text(encoding="utf-8"))
    assert "This run is not finished, and there is no verdict yet." in page
    assert not any(words in page for words in VERDICTS)
    assert f"The set has {len(data)} images of 5 classes." in page
    accused = "Accused so far: grey0. Their samples are not judged yet." in page
    assert accused == (data is POISONED and stage != "purify")
    assert "<td>to come</td>" in page
    done = len(Record.finished(WatchedFolder(out)))
    assert f"{done} of {5 if data is POISONED or stage == 'purify' else 3} stages are done" in page
    assert page.count("<td>took ") == done


def test_the_page_is_a_verdict_only_once_the_run_is_finished(killed, tmp_path):
    out = killed(CLEAN, "report", before=False)
    assert not any(words in shown((out / PAGE).read_text(encoding="utf-8")) for words in VERDICTS)
    run(tmp_path / "set", out)
    page = (out / PAGE).read_text(encoding="utf-8")
    assert "No backdoor was found" in page
    assert "not finished" not in page
    assert 'http-equiv="refresh"' not in page


def test_a_finished_run_that_is_asked_again_keeps_its_page(finished, monkeypatch):
    data, out = finished
    before = (out / PAGE).read_text(encoding="utf-8")
    monkeypatch.setattr(WatchedFolder, "_write_page", None)
    run(data, out)
    assert (out / PAGE).read_text(encoding="utf-8") == before


def test_the_page_of_a_stage_names_it_and_is_written_again_with_every_line(tmp_path):
    folder = WatchedFolder(tmp_path)
    folder.watch(
        [Stage("victim", "training", 60.0, 3), Stage("report", "report", 0.0)], 7, ["a", "b"]
    )
    with folder.stage("victim"):
        first = (tmp_path / PAGE).read_text(encoding="utf-8")
        assert re.search(r"stage 1 of 2 \(victim\), about \d+ s left", first)
        assert "<td>under way</td>" in first
        (tmp_path / PAGE).unlink()
        folder.overall.said = -1e9
        folder.advance(1)
        assert (tmp_path / PAGE).exists()
    assert "1 of 2 stages are done" in (tmp_path / PAGE).read_text(encoding="utf-8")


def test_names_are_shown_as_text(tmp_path):
    folder = WatchedFolder(tmp_path)
    names = ["<script>", "b\udce9"]
    folder.watch([Stage("purify", "purify", 1.0), Stage("report", "report", 0.0)], 7, names)
    with folder.stage("purify") as notes:
        notes |= {"target_labels": [0], "undecided": [1]}
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "Accused so far: &lt;script&gt;." in page
    assert "Too small to be judged: b\\udce9." in page


def test_the_verdict_is_told_as_soon_as_it_stands(killed):
    out = killed(POISONED, "stage1")
    log = (out / "log.txt").read_text(encoding="utf-8")
    assert "class 'grey0' accused, splitting it" in log
    assert assessment._accused(["a b", "c"], True) == "classes 'a b', 'c' accused, splitting them"


def test_the_time_left_is_told_over_all_stages(toy, tmp_path):
    run(toy(POISONED), tmp_path / "out")
    lines = re.findall(
        r"stage (\d) of (\d) \((\w+)\), about .* left", (tmp_path / "out" / "log.txt").read_text()
    )
    begun = list(dict.fromkeys(lines))
    assert begun == [
        (str(k + 1), "5", name)
        for k, name in enumerate(["victim", "purify", "stage1", "finetune", "report"])
    ]


def test_a_run_that_goes_on_and_one_with_a_victim_plan_what_is_left(killed, tmp_path):
    out = killed(POISONED, "stage1")
    run(tmp_path / "set", out)
    log = (out / "log.txt").read_text(encoding="utf-8")
    assert log.count("stage 1 of 5 (victim)") == 1
    assert "stage 3 of 5 (stage1)" in log
    assert "Accused so far" not in (out / PAGE).read_text(encoding="utf-8")
    config = find_defense("dataelixir")(**CHOSEN)
    assert cleaning.planned(POISONED, config, toy_dataset(), True)[0].name == "purify"
