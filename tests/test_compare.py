"""The comparison: what is run and what is not run again, and tables that can be recomputed by hand."""

import csv
import json
import re
import subprocess
import sys

import pytest
import yaml

from benchmarks import compare
from benchmarks.comparison import Cell, Run, case_names, lines, notes, overview, write_results
from utils.config import UserError
from utils.storage import record as record_module
from utils.storage.record import Record

CONFIG = {
    "attack": "badnet",
    "pratio": 0.1,
    "dataset": "toy",
    "random_seed": 4,
    "epochs": 3,
    "device": "cpu",
}


def report(defense="spectral", asr=0.25, removed=7, **changes):
    model = lambda asr: {"c_acc": 0.9, "asr": asr, "r_acc": 0.5, "n_clean": 100, "n_triggered": 90}
    return {
        "defense": defense,
        "status": "ok",
        "victim": model(1.0),
        "benign": model(asr),
        "der": 0.75,
        "detection": {"tpr": 0.5, "fpr": 0.1},
        "relabel": {"accuracy_on_poison": None, "label_accuracy": 0.95},
        "suspicion": {"auroc": None},
        "knowledge": ["poison rate"],
        "training_epochs": 3,
        "removed": removed,
        "cost": {
            "seconds": {"poison": 100, "victim": 50, "inspect": 2, "benign": 5},
            "device": "cpu",
        },
        "versions": {"threads": 1},
    } | changes


def run_of(record="a", defense="spectral", seed=4, config=CONFIG, **changes):
    return Run(record, config, defense, seed, report(defense, **changes))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Two records below a temporary folder, and runs that write config and report instead of defending; returns the commands that were run."""
    monkeypatch.setattr(record_module, "RECORDS", tmp_path / "record")
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results")
    for name, seed in (("a", 4), ("b", 5)):
        (Record(name) / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"random_seed": seed}))
    commands = []

    def defended(words, env):
        commands.append(words)
        name = words[1].rsplit("/", 1)[-1][:-3]
        folder = (
            Record(words[words.index("--result_file") + 1])
            / "defense"
            / words[words.index("--run_name") + 1]
        )
        if name != "scan":
            folder.mkdir(parents=True, exist_ok=True)
            keys = {key[2:]: yaml.safe_load(value) for key, value in zip(words[2::2], words[3::2])}
            (folder / "config.yaml").write_text(
                yaml.safe_dump(CONFIG | {"budget": "rate", "lr": 0.05, "compile": "off"} | keys)
            )
            (folder / "report.json").write_text(
                json.dumps(
                    report(
                        name,
                        removed=0 if name == "none" else 7,
                        knowledge=["poison rate"] * (name == "spectral"),
                    )
                )
            )
        return subprocess.CompletedProcess(words, 0 if name != "scan" else 2)

    monkeypatch.setattr(compare.subprocess, "run", defended)
    return commands


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    compare.main()


def test_a_defence_is_read_from_its_words():
    spec = compare.Spec.parse("spectral:budget=share,class_share=0.2")
    assert (spec.name, spec.keys, spec.alike) == (
        "spectral",
        {"budget": "share", "class_share": "0.2"},
        None,
    )
    assert spec.folder(4) == "spectral-budget-share-class_share-0.2-seed4"
    alike = compare.Spec.parse("random_remove@spectral:budget=share")
    assert (alike.name, alike.keys, alike.alike.name, alike.alike.keys) == (
        "random_remove",
        {},
        "spectral",
        {"budget": "share"},
    )
    assert {compare.Spec.parse(text).text for text in compare.DEFENSES} == set(compare.DEFENSES)
    for wrong in (
        "spectrl",
        "spectral:",
        "spectral:budget",
        "none@spectral",
        "../spectral",
        "random_remove@nothing",
    ):
        with pytest.raises(UserError, match="defenses: '"):
            compare.Spec.parse(wrong)


def test_what_is_missing_is_run_once(world, monkeypatch, capsys):
    words = [
        "--records",
        "a",
        "b",
        "--defenses",
        "none",
        "spectral:budget=share",
        "random_remove@spectral:budget=share",
        "--seeds",
        "2",
        "--name",
        "t",
    ]
    call(monkeypatch, *words)
    assert len(world) == 2 * 3 * 2
    seeds = [word[word.index("--random_seed") + 1] for word in world]
    assert seeds == ["4", "5"] * 3 + ["5", "6"] * 3  # counted from the record's own
    assert [w[w.index("--budget") + 1] for w in world if "--budget" in w] == ["share"] * 4
    assert [w[w.index("--remove_count") + 1] for w in world if "--remove_count" in w] == ["7"] * 4
    call(monkeypatch, *words)
    assert len(world) == 12
    assert "| badnet 0.1, toy | none | 4 |" in capsys.readouterr().out


def test_a_run_that_fails_stops_no_other_and_is_named(world, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(
            monkeypatch,
            "--records",
            "a",
            "--defenses",
            "scan",
            "random_remove@scan",
            "none",
            "--name",
            "t",
        )
    assert stopped.value.code == 2
    assert "2 runs are absent" in capsys.readouterr().err
    text = (tmp_path / "results" / "t.md").read_text()
    assert "| none | 1 |" in text
    assert "Absent: a: scan, seed 4; a: random_remove@scan, seed 4." in text


def test_only_finished_runs_nothing(world, monkeypatch):
    with pytest.raises(SystemExit):
        call(monkeypatch, "--records", "a", "--defenses", "none", "--only_finished")
    assert not world


def test_a_damaged_report_is_named_once_and_made_again(world, monkeypatch, tmp_path, capsys):
    words = [
        "--records",
        "a",
        "--defenses",
        "none",
        "spectral",
        "random_remove@spectral",
        "--name",
        "t",
    ]
    call(monkeypatch, *words)
    folder = Record("a") / "defense" / "spectral-seed4"
    for damaged in ('{"defense": "spec', "[]", "\0" * 9, "[" * 100_000):
        (folder / "report.json").write_text(damaged)
        compare.complain.cache_clear()
        with pytest.raises(SystemExit):
            call(monkeypatch, *words, "--only_finished")
        told = capsys.readouterr().err.splitlines()
        assert [line for line in told if "damaged" in line] == [
            f"{folder / 'report.json'}: damaged, it counts as absent"
        ]
        assert "1 runs are absent" in told[-1]
        assert "| none | 1 |" in (tmp_path / "results" / "t.md").read_text()
    call(monkeypatch, *words)
    assert len(world) == 4
    assert world[-1][1].endswith("spectral.py")


@pytest.mark.parametrize(
    "flags",
    [
        ["--epochs", "5"],
        ["--epochs=5"],
        ["--device", "cuda", "--epochs", "5", "--amp"],
        ["--lr", "5e-1"],
        ["--budget=share"],
    ],
)
def test_a_run_with_other_keys_is_not_taken_for_the_one_that_is_asked_for(
    world, monkeypatch, flags, capsys
):
    words = ["--records", "b", "a", "--defenses", "none", "spectral", "--name", "t"]
    call(monkeypatch, *words)
    (
        Record("b") / "defense" / "none-seed5" / "config.yaml"
    ).unlink()  # nobody knows how that one was made: it counts
    (Record("b") / "defense" / "spectral-seed5" / "report.json").unlink()
    (Record("a") / "defense" / "none-seed4" / "report.json").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *words, "--", *flags)
    told, key, value = (
        capsys.readouterr().err,
        *re.search(r"--(epochs|lr|budget)[= ](\S+)", " ".join(flags)).groups(),
    )
    assert stopped.value.code == 2
    assert len(world) == 4
    assert len(told.splitlines()) <= 2
    had = {"epochs": "3", "lr": "0.05", "budget": "'rate'"}[key]
    assert all(
        part in told
        for part in (
            f"{key}: {Record('a') / 'defense' / 'spectral-seed4'} ",
            had,
            value,
            "delete",
            f"spectral:{key}={value}",
        )
    )


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--epochs", "3"],
        ["--epochs=3", "--lr=5e-2"],
        ["--device", "cuda"],
        ["--unknown_to_it", "7"],
        ["--lr", "0.050", "--compile", "off"],
    ],
)
def test_flags_that_change_nothing_make_nothing_again(world, monkeypatch, flags):
    words = [
        "--records",
        "a",
        "--defenses",
        "none",
        "spectral:budget=share",
        "random_remove@spectral:budget=share",
        "--name",
        "t",
    ]
    call(monkeypatch, *words)
    call(monkeypatch, *words, "--", *flags)
    assert len(world) == 3


def test_a_control_whose_count_is_no_longer_that_of_the_other_is_not_taken_for_it(
    world, monkeypatch, capsys
):
    words = ["--records", "a", "--defenses", "spectral", "random_remove@spectral", "--name", "t"]
    call(monkeypatch, *words)
    (Record("a") / "defense" / "spectral-seed4" / "report.json").write_text(
        json.dumps(report(removed=9))
    )
    with pytest.raises(SystemExit):
        call(monkeypatch, *words)
    assert "remove_count" in (told := capsys.readouterr().err)
    assert " 7, and 9 is asked for" in told
    assert len(world) == 2


def test_a_control_says_whose_count_it_took_and_what_that_one_knew(world, monkeypatch, capsys):
    call(
        monkeypatch,
        "--records",
        "a",
        "--defenses",
        "none",
        "spectral",
        "random_remove@spectral",
        "--name",
        "t",
    )
    shown = [
        line.split("|")[-2].strip()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| badnet 0.1, toy | random")
    ]
    assert shown == ["poison rate, as many as spectral"]


def test_a_record_that_is_not_there_is_named(world, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, "--records", "c")
    assert "there is no" in capsys.readouterr().err
    assert not world


def test_the_records_own_defence_counts_for_its_own_seed_and_keys(world):
    record, of = (
        Record("a"),
        lambda text, seed, extra=(): compare.finished(
            Record("a"), compare.Spec.parse(text), seed, extra
        ),
    )
    (record / "report.json").write_text(json.dumps(report("dataelixir")))
    assert of("dataelixir", 4)
    assert of("dataelixir", 5) is None
    assert of("dataelixir:steps_T=9", 4) is None
    assert of("none", 4) is None
    assert of("dataelixir", 4, ["--epochs", "3"])
    assert of("dataelixir", 4, ["--epochs", "5"]) is None
    (record / "report.json").write_text(json.dumps(report("random_remove")))
    assert of("random_remove", 4)
    assert of("random_remove@spectral", 4) is None
    old = report("dataelixir")
    del old["training_epochs"]
    (record / "report.json").write_text(json.dumps(old))
    assert of("dataelixir", 4) is None  # written before reports said what this table needs


def test_records_that_differ_in_their_seed_alone_are_one_case():
    runs = [
        run_of("a"),
        run_of("b", config=CONFIG | {"random_seed": 9, "device": "cuda"}),
        run_of("c", config=CONFIG | {"pratio": 0.01}),
    ]
    assert list(case_names(runs).values()) == [
        "badnet 0.1, toy",
        "badnet 0.1, toy",
        "badnet 0.01, toy",
    ]
    other = case_names([*runs, run_of("d", config=CONFIG | {"epochs": 9})])
    assert other["a"] == other["b"] == "badnet 0.1, toy (a)"
    assert other["d"] == "badnet 0.1, toy (d)"


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.5], "0.500"),
        ([0.5, None], "0.500 (1 of 2)"),
        ([None], "n/a"),
        ([], "n/a"),
        ([0.1, 0.2, 0.3], "0.200 ± 0.100"),
        ([0.1, None, 0.3], "0.200 ± 0.141 (2 of 3)"),
    ],
)
def test_cells(values, shown):
    assert Cell.of(values).show(3) == shown


def test_means_and_deviations_by_hand():
    table = lines(
        [run_of(asr=0.1), run_of(seed=5, asr=0.3), run_of(defense="none", asr=1.0, knowledge=[])]
    )
    assert [(line.defense, line.runs, line.knowledge) for line in table] == [
        ("spectral", 2, "poison rate"),
        ("none", 1, "-"),
    ]
    cells = table[0].cells
    assert cells["ASR"].mean == pytest.approx(0.2)
    assert cells["ASR"].deviation == pytest.approx(0.02**0.5)
    assert cells["seconds"].mean == 7
    assert cells["relabel acc."].mean is None
    assert cells["TPR at 1% FPR"].mean is None


def test_the_files(tmp_path):
    write_results(
        tmp_path / "t",
        [run_of(asr=0.1), run_of(seed=5, asr=0.3), run_of(defense="<b>", knowledge=[])],
        [],
    )
    table, every = (list(csv.DictReader(open(tmp_path / name))) for name in ("t.csv", "t_runs.csv"))
    assert [row["runs"] for row in table] == ["2", "1"]
    assert float(table[0]["ASR mean"]) == pytest.approx(0.2)
    assert table[1]["ASR sd"] == ""
    assert [row["ASR n"] for row in table] == ["2", "1"]
    assert {row["relabel acc. n"] for row in table} == {"0"}
    assert [row["ASR"] for row in every] == ["0.1", "0.3", "0.25"]
    assert [row["seed"] for row in every] == ["4", "5", "4"]
    assert (
        "| badnet 0.1, toy | spectral | 2 | 0.9000 ± 0.0000 | 0.2000 ± 0.1414 |"
        in (tmp_path / "t.md").read_text()
    )
    page = (tmp_path / "t.html").read_text()
    assert "<td>&lt;b&gt;</td>" in page
    assert "<td>0.2000 ± 0.1414</td>" in page
    assert "$" not in page
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,iVBOR)', page) == []


def test_the_overview_crosses_defences_and_cases(tmp_path):
    runs = [
        run_of(asr=0.1),
        run_of(seed=5, asr=0.3),
        run_of("b", "none", config=CONFIG | {"pratio": 0.01}, asr=1.0, knowledge=[]),
    ]
    assert overview(lines(runs)) == [
        ["defense", "badnet 0.1, toy", "badnet 0.01, toy", "knowledge"],
        ["spectral", "90.0 / 20.0", "-", "poison rate"],
        ["none", "-", "90.0 / 100.0", "-"],
    ]
    write_results(tmp_path / "t", runs, [])
    assert "| spectral | 90.0 / 20.0 | - | poison rate |" in (tmp_path / "t.md").read_text()


def test_the_notes_say_how_much_the_numbers_weigh():
    told = notes([run_of(), run_of("b", seed=5)], ["c: none, seed 1"])
    assert "2 record(s), 2 run(s)" in told[0]
    assert "9.8 and 10.3 points" in told[0]
    assert "failed" not in told[0]
    assert "last epoch" in told[1]
    assert told[-1] == "Absent: c: none, seed 1."
    assert "The attack failed here" in notes([run_of(status="attack-failed")], [])[0]
