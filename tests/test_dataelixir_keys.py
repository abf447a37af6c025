"""Keys of DataElixir that cannot serve a set, and what `conform` overrides."""

from dataclasses import replace

import pytest
import torch

from defense import dataelixir
from defense.elixir.config import PUBLISHED, DataElixirConfig, PurifyConfig
from defense.elixir.purifier import open_denoiser
from defense.elixir.target_label import PUBLISHED_RULE
from tests.toys import FlatDenoiser, PatchReader, toy_dataset
from utils.config import UserError
from utils.storage import record as record_module
from utils.storage.record import Record

DATASET = toy_dataset()


@pytest.fixture(autouse=True)
def own_records(tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "RECORDS", tmp_path)


def test_two_classes_are_refused_since_neither_can_lie_apart_from_the_other():
    with pytest.raises(UserError, match="dataset: 2 classes; .* takes three or more"):
        dataelixir.check(DataElixirConfig(ddpm="digits"), replace(DATASET, classes=("a", "b")))


@pytest.mark.parametrize(("tau", "warned"), [(4, False), (5, True)])
def test_a_tau_that_no_two_labels_can_reach_is_told(monkeypatch, caplog, tau, warned):
    monkeypatch.setattr(dataelixir, "open_denoiser", lambda *_: FlatDenoiser())
    config = DataElixirConfig(
        steps_T=8, rounds_n=2, last_steps_m=4, threshold_tau=tau, device="cpu", amp=False
    )
    dataelixir.purify(DATASET.train, PatchReader(), config, DATASET, Record("run"))
    assert (
        any(
            "threshold_tau: of 2 x 4 intermediaries" in line and "at most 4" in line
            for line in caplog.messages
        )
        == warned
    )


def test_conform_overrides_every_key_that_decides():
    """Whatever a record or a config file gave; only T, n, m and tau are taken from it."""
    other = DataElixirConfig(
        conform=True,
        outlier_threshold=5.0,
        selection_rank=0.1,
        inflow_threshold=1.0,
        relabel_source="purified",
        target_first=True,
    )
    resolved = other.resolved()
    assert resolved.target_rule == PUBLISHED_RULE
    assert (
        resolved.selection_rank,
        resolved.relabel_source,
        resolved.target_first,
    ) == (0.8, "raw", False)
    deciding = [
        name
        for name in DataElixirConfig.__dataclass_fields__
        if name in dataelixir.DataElixirConfig.__doc__
    ]
    left = set(deciding[deciding.index("outliers") :]) - set(PUBLISHED)
    assert left == {
        "sample_first",
        "sample_error",
        "keep_intermediaries",
    }  # which decide nothing where everything is purified


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"reverse_steps": 500}, "cannot visit 500 of 300"),
        ({"reverse_steps": 8}, "8 steps are too few to keep the last 10"),
        ({"last_steps_m": 400}, "cannot keep the last 400 of 300"),
    ],
)
def test_steps_that_no_level_has_are_refused_at_once_where_the_level_is_to_be_found(keys, told):
    with pytest.raises(UserError, match=told):
        open_denoiser(PurifyConfig(ddpm="digits", steps_T="auto", **keys), 32, "digits")
    assert torch.is_tensor(
        next(open_denoiser(PurifyConfig(ddpm="digits", steps_T="auto"), 32, "digits").parameters())
    )


def test_what_is_purified_is_neither_measured_nor_made_again(monkeypatch):
    """A run that was interrupted later on goes on at once, also where it had to look for its noise level."""
    asked, forward = [], FlatDenoiser.forward
    monkeypatch.setattr(
        FlatDenoiser, "forward", lambda self, x, t: asked.append(len(x)) or forward(self, x, t)
    )
    monkeypatch.setattr(dataelixir, "open_denoiser", lambda *_: FlatDenoiser())
    config, record = (
        DataElixirConfig(
            steps_T="auto", rounds_n=2, last_steps_m=4, threshold_tau=4, device="cpu", amp=False
        ),
        Record("run"),
    )
    record.claim({"steps_T": "auto"})
    with record.stage("purify"):
        first, found = dataelixir.purify(DATASET.train, PatchReader(), config, DATASET, record)
    before = len(asked)
    again, found_again = dataelixir.purify(DATASET.train, PatchReader(), config, DATASET, record)
    assert before
    assert len(asked) == before
    assert torch.equal(first.votes(), again.votes())
    assert found.targets == found_again.targets
    assert first.rounds.purifier.config == again.rounds.purifier.config
