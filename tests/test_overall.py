"""The time left over all stages, with a clock that is set by hand."""

import pytest

from utils.overall import EVERY, Overall, Stage

PLAN = [
    Stage("victim", "training", 100.0, 10),
    Stage("purify", "purify", 600.0, 300),
    Stage("stage1", "training", 100.0, 10, optional=True),
    Stage("finetune", "training", 50.0, 5, optional=True),
    Stage("report", "report", 0.0),
]


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def run():
    """(clock, overall, lines told)."""
    clock, told = Clock(), []
    return clock, Overall(PLAN, told.append, clock), told


def test_forecasts_are_told_first(run):
    clock, overall, told = run
    overall.begin("victim")
    assert told == ["stage 1 of 5 (victim), about 12 min to 14 min left"]
    assert overall.left() == (700.0, 850.0)
    clock.now += 40
    assert overall.left() == (660.0, 810.0)
    clock.now += 1000  # a forecast that was far too low promises no time that is over
    assert overall.left() == (600.0, 750.0)


def test_a_step_that_takes_twice_as_long_corrects_its_stage_and_its_kind(run):
    clock, overall, _ = run
    overall.begin("victim")
    clock.now += 33  # what the first step takes is no measure: the one before it began earlier
    overall.advance(1)
    clock.now += 20
    overall.advance(2)
    assert overall.left() == (8 * 20 + 600, 8 * 20 + 600 + 2 * 150)
    clock.now += 60
    overall.advance(6)  # 80 seconds for five steps
    assert overall.left() == (4 * 16 + 600, pytest.approx(4 * 16 + 600 + 1.6 * 150))


def test_what_a_stage_took_corrects_the_later_ones_of_its_kind(run):
    clock, overall, _ = run
    overall.begin("victim")
    overall.end("victim", 50.0)
    assert overall.line() == "1 of 5 stages are done, about 10 min to 11 min left"
    assert overall.left() == (600.0, 600.0 + 0.5 * 150)
    overall.begin("purify")
    overall.advance(100, 300)
    clock.now += 100
    overall.advance(200, 400)  # more images than was thought
    assert overall.left() == (200.0, 275.0)


def test_a_run_that_goes_on_counts_what_was_done_before(run):
    """Steps from before are no pace: a training that goes on after epoch 8 is not nearly over at once."""
    clock, overall, _ = run
    overall.end("victim", 200.0)
    overall.end("purify", 600.0)
    overall.begin("stage1")
    clock.now += 1
    overall.advance(9)
    assert overall.left()[1] == 199.0 + 100.0
    clock.now += 30
    overall.advance(10)
    assert overall.left()[1] == 3 * 50.0


def test_stages_that_are_not_needed_are_over(run):
    _, overall, told = run
    overall.end("victim", 100.0)
    overall.begin("purify")
    overall.end("purify", 300.0, ["stage1", "finetune"])
    overall.begin("report")
    assert told[-1] == "stage 3 of 3 (report), about 0 s left"
    assert overall.states() == [
        ("victim", "took 2 min"),
        ("purify", "took 5 min"),
        ("report", "under way"),
    ]


def test_states_in_words(run):
    _, overall, _ = run
    overall.end("victim", 34.0)
    overall.begin("purify")
    assert [state for _, state in overall.states()] == [
        "took 34 s",
        "under way",
        "if needed",
        "if needed",
        "to come",
    ]


def test_lines_are_few(run):
    """However many steps: one in EVERY seconds, and fewer where hours are left."""
    clock, overall, told = run
    overall.begin("purify")
    for step in range(1, 601):
        clock.now += 1
        overall.advance(step, 600)
    assert 600 / EVERY / 2 <= len(told) <= 600 / EVERY + 1
    hours = Overall([Stage("purify", "purify", 36000.0, 36000)], told.append, clock)
    told.clear()
    hours.begin("purify")
    for step in range(1, 3601):
        clock.now += 1
        hours.advance(step)
    assert 2 <= len(told) <= 7


def test_steps_between_stages_are_nobodys(run):
    _, overall, told = run
    overall.advance(3, 4)
    assert told == []
