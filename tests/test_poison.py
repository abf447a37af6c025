"""Poisoning: how many, from which pool, with which labels, and nothing else touched."""

import random
from dataclasses import replace

import pytest
import torch

from attack.poisoning.config import PoisonConfig
from attack.poisoning.labels import LabelMap, label_map, with_target_number
from attack.poisoning.poison import Role, choose_poison, poison_training_set, trigger_test_set
from attack.poisoning.trigger import Trigger
from tests.toys import CleanLabelTrigger, ToyTrigger, random_images
from utils.config import UserError
from utils.images.data import LabeledImages

TOY = ToyTrigger()
K, COUNTS = 5, (40, 25, 20, 10, 5)  # images of class 0..4, 100 in all
ONE = PoisonConfig(pratio=0.1, attack_target=2)
ALL = replace(ONE, attack_label_trans="all2all")


def data(seed=0):
    labels = torch.tensor([k for k, count in enumerate(COUNTS) for _ in range(count)])
    order = torch.randperm(100, generator=torch.Generator().manual_seed(seed))
    return LabeledImages(random_images(100, 3, 4, 4), labels[order])


def poison(config=ONE, trigger=TOY, train=None, seed=0):
    return poison_training_set(
        train or data(), trigger, label_map(trigger, config, K), config, seed
    )


def chosen(config=ONE, trigger=TOY, labels=None, seed=0):
    labels = data().labels if labels is None else labels
    return choose_poison(labels, trigger, label_map(trigger, config, K), config, seed)


@pytest.mark.parametrize(
    ("config", "trigger"),
    [
        (ONE, ToyTrigger()),
        (ALL, ToyTrigger()),
        (ONE, CleanLabelTrigger()),
        (replace(ONE, attack_pool="all"), ToyTrigger()),
    ],
)
def test_only_the_chosen_rows_change_and_they_carry_trigger_and_label(config, trigger):
    train, before = data(), data()
    found = poison(config, trigger, train)
    hit = found.poison_indicator
    assert hit.sum() == 10
    assert torch.equal(found.roles, torch.where(hit, Role.POISON, Role.CLEAN))
    assert torch.equal(found.data.images[~hit], train.images[~hit])
    assert torch.equal(found.data.labels[~hit], train.labels[~hit])
    index = hit.nonzero().flatten()
    assert torch.equal(found.data.images[hit], trigger.apply(train.images[hit], index, "train"))
    assert (found.data.images[hit] != train.images[hit]).flatten(1).any(1).all()
    assert torch.equal(found.data.labels[hit], label_map(trigger, config, K)(train.labels[hit]))
    assert torch.equal(found.original_labels, before.labels)
    assert torch.equal(train.images, before.images)
    assert torch.equal(train.labels, before.labels)


@pytest.mark.parametrize("rate", [0, 0.016, 0.026, 0.1, 0.126, 0.25, 0.8])
def test_the_count_is_exactly_the_rounded_rate(rate):
    assert len(chosen(replace(ONE, pratio=rate)).unique()) == round(rate * 100)
    labels = torch.arange(5).repeat_interleave(11)
    assert len(chosen(replace(ONE, pratio=rate), labels=labels)) == round(rate * 55)


def test_rates_of_the_target_class():
    of_target = replace(ONE, rate_of="target_class", pratio=0.5)
    clean = chosen(of_target, CleanLabelTrigger())
    assert len(clean) == COUNTS[2] / 2
    assert (data().labels[clean] == 2).all()
    dirty = chosen(of_target)
    assert len(dirty) == COUNTS[2] / 2
    assert (data().labels[dirty] != 2).all()
    assert len(chosen(replace(of_target, pratio=1.0), CleanLabelTrigger())) == COUNTS[2]


def test_pools():
    labels = data().labels
    everything = lambda config, trigger=TOY: set(labels[chosen(config, trigger)].tolist())
    assert everything(replace(ONE, pratio=0.8)) == {0, 1, 3, 4}
    assert len(chosen(replace(ONE, pratio=0.8))) == 80
    assert everything(replace(ONE, pratio=1.0, attack_pool="all")) == set(range(5))
    assert everything(replace(ALL, pratio=1.0)) == set(
        range(5)
    )  # no class is *the* target: all take part
    assert everything(replace(ONE, pratio=0.2), CleanLabelTrigger()) == {2}


def test_every_sample_of_the_pool_is_equally_likely():
    hits = torch.zeros(100)
    for seed in range(400):
        hits[chosen(seed=seed)] += 1
    pool = data().labels != 2
    assert (hits[~pool] == 0).all()
    assert (hits[pool] - 50).abs().max() < 5 * (400 * 0.125 * 0.875) ** 0.5


@pytest.mark.parametrize(
    ("config", "trigger", "words"),
    [
        (
            replace(ONE, pratio=0.81),
            ToyTrigger(),
            r"pratio: 0.81 of 100 images are 81, but the pool \(all classes but 2\) holds 80",
        ),
        (
            replace(ONE, pratio=0.004),
            ToyTrigger(),
            r"pratio: 0.004 of 100 images are none; raise pratio",
        ),
        (
            replace(ONE, pratio=0.02, rate_of="target_class"),
            CleanLabelTrigger(),
            r"pratio: 0.02 of 20 images are none; raise pratio",
        ),
        (
            replace(ONE, pratio=0.21),
            CleanLabelTrigger(),
            r"0.21 of 100 images are 21, but the pool \(class 2\) holds 20.*rate_of: target_class",
        ),
    ],
)
def test_a_rate_that_poisons_nothing_and_a_pool_too_small_are_refused_with_the_numbers(
    config, trigger, words
):
    with pytest.raises(UserError, match=words):
        poison(config, trigger)
    with pytest.raises(
        UserError, match="pratio: 0.1 of 0 images are none; give another attack_target"
    ):
        chosen(replace(ONE, rate_of="target_class"), labels=torch.tensor([0, 1, 3]))


def test_indices_depend_on_seed_and_attack_and_nothing_else():
    first = chosen()
    torch.manual_seed(9)
    random.seed(9)
    torch.rand(5)
    assert torch.equal(chosen(), first)
    assert first.tolist() == sorted(first.tolist())
    assert len({tuple(chosen(seed=seed).tolist()) for seed in range(20)}) == 20

    class Other(ToyTrigger):
        name = "other"

    assert not torch.equal(chosen(trigger=Other()), first)


def test_all_to_one_and_all_to_all_labels():
    labels = torch.arange(K)
    one, every = LabelMap(K, 3), LabelMap(K, None)
    assert one(labels).tolist() == [3] * K
    assert one.targets == [3]
    assert every(labels).tolist() == [1, 2, 3, 4, 0]
    assert every.targets == list(range(K))
    assert (every(labels) != labels).all()
    assert every(labels).unique().tolist() == labels.tolist()
    assert labels.tolist() == list(range(K))


def test_several_targets_share_the_labels_by_their_remainders():
    several = LabelMap(30, (3, 10, 25))
    assert several(torch.arange(12)).tolist() == [3, 10, 25, 10, 10, 25, 3, 10, 25, 3, 25, 25]
    assert several(torch.tensor([25])).tolist() == [10]  # 25 mod 3 = 1 is class 10
    assert several.targets == [3, 10, 25]
    for targets in ((0, 1), (1, 0), (4, 0, 2), (2, 3, 4, 0)):
        labels = LabelMap(K, targets)(torch.arange(K))
        assert (labels != torch.arange(K)).all()
        assert set(labels.tolist()) <= set(targets)
        assert LabelMap(K, targets).targets == sorted(targets)


def test_several_targets_poison_every_class():
    config = replace(ONE, attack_target=[1, 3], pratio=1.0)
    found = poison(config)
    assert found.poison_indicator.all()
    assert torch.equal(found.data.labels, LabelMap(K, (1, 3))(data().labels))
    test = trigger_test_set(data(), TOY, label_map(TOY, config, K))
    assert len(test.index) == 100
    assert (test.labels != test.original_labels).all()


@pytest.mark.parametrize(("rank", "label"), [("smallest", 4), ("median", 2), ("largest", 0)])
def test_a_target_can_be_named_by_its_size(rank, label):
    labels = data().labels
    assert with_target_number(replace(ONE, attack_target=rank), labels).attack_target == label
    assert with_target_number(ONE, labels) is ONE
    even = torch.tensor([3, 3, 1, 1, 2, 2, 0, 0])
    place = {"smallest": 0, "median": 1, "largest": 3}[rank]
    assert with_target_number(replace(ONE, attack_target=rank), even).attack_target == place


def test_of_a_source_class_alone_images_become_poison_and_of_the_others_cover():
    config = replace(ONE, source_class=1, attack_target=3)
    found, given = poison(config), data()
    hit, cover = found.poison_indicator, found.roles == Role.COVER
    assert (given.labels[hit] == 1).all()
    assert (found.data.labels[hit] == 3).all()
    assert int(hit.sum()) == int(cover.sum()) == 10
    assert set(given.labels[cover].tolist()) <= {0, 2, 4}
    assert torch.equal(found.data.labels[~hit], given.labels[~hit])
    index = cover.nonzero().flatten()
    assert torch.equal(found.data.images[cover], TOY.apply(given.images[cover], index))
    own = poison(config, Covered())
    assert int((own.roles == Role.COVER).sum()) == 20  # its own are enough
    for pool in ("all", "non_target"):
        everything = poison(replace(config, pratio=0.25, attack_pool=pool))
        assert torch.equal(everything.poison_indicator, given.labels == 1)


def test_the_asr_set_of_a_source_class_is_that_class():
    config = replace(ONE, source_class=1, attack_target=3)
    found = trigger_test_set(data(), TOY, label_map(TOY, config, K))
    assert torch.equal(found.index, (data().labels == 1).nonzero().flatten())
    assert (found.labels == 3).all()


def test_a_source_class_that_is_too_small_or_leaves_too_few_is_refused():
    words = r"pratio: 0.26 of 100 images are 26, but the pool \(source_class 1\) holds 25; lower"
    with pytest.raises(UserError, match=words):
        poison(replace(ONE, source_class=1, pratio=0.26))
    few = data()[data().labels.le(1) | data().labels.eq(4)]
    with pytest.raises(UserError, match="source_class: .* 40 poisoned .* only 30 are left; lower"):
        poison(replace(ONE, source_class=0, attack_target=2, pratio=40 / 70), train=few)


@pytest.mark.parametrize(
    ("changes", "trigger", "words"),
    [
        (
            {"attack_target": [1, 5]},
            ToyTrigger(),
            r"attack_target: 5 is outside the classes 0\.\.4",
        ),
        ({"attack_target": [1]}, ToyTrigger(), r"attack_target: \[1\] is no list of two"),
        ({"attack_target": []}, ToyTrigger(), r"attack_target: \[\] is no list of two"),
        ({"attack_target": [1, 2, 1]}, ToyTrigger(), r"attack_target: \[1, 2, 1\] is no list"),
        (
            {"attack_target": [1, 2]},
            CleanLabelTrigger(),
            r"attack_target: \[1, 2\] changes labels.*'toy_clean' never does; give one class",
        ),
        (
            {"attack_target": [1, 2], "rate_of": "target_class"},
            ToyTrigger(),
            "rate_of: target_class, but several targets",
        ),
        ({"source_class": 2}, ToyTrigger(), "source_class: 2 is the target too"),
        ({"source_class": 5}, ToyTrigger(), "source_class: 5 is outside the classes"),
        ({"source_class": 1}, CleanLabelTrigger(), "source_class: 1, but the clean-label attack"),
        (
            {"source_class": 1, "attack_label_trans": "all2all"},
            ToyTrigger(),
            "source_class: 1, but .* all2all names several",
        ),
        (
            {"source_class": 1, "attack_target": [2, 3]},
            ToyTrigger(),
            "source_class: 1, but .* a list names several",
        ),
        (
            {"attack_label_trans": "all2all"},
            CleanLabelTrigger(),
            "attack_label_trans: .*clean-label attack 'toy_clean'",
        ),
        (
            {"attack_label_trans": "all2all", "rate_of": "target_class"},
            ToyTrigger(),
            "rate_of: target_class, but all2all",
        ),
        ({"attack_target": 5}, ToyTrigger(), r"attack_target: 5 is outside the classes 0\.\.4"),
        (
            {"attack": "blended"},
            ToyTrigger(),
            "attack: this config is for 'blended', but the script is attack/toy.py",
        ),
    ],
)
def test_configs_that_contradict_the_attack_are_refused(changes, trigger, words):
    with pytest.raises(UserError, match=words):
        label_map(trigger, replace(ONE, **changes), K)
    assert label_map(ToyTrigger(), replace(ONE, attack="toy", attack_target=4), K).targets == [4]


def test_clean_labels_stay():
    found = poison(replace(ONE, pratio=0.2), CleanLabelTrigger())
    assert torch.equal(found.data.labels, data().labels)
    assert (found.data.labels[found.poison_indicator] == 2).all()


@pytest.mark.parametrize("trigger", [ToyTrigger(), CleanLabelTrigger()])
def test_the_asr_set_is_every_image_whose_label_would_change(trigger):
    test = data()
    found = trigger_test_set(test, trigger, label_map(trigger, ONE, K))
    assert len(found.index) == 80
    assert not (found.original_labels == 2).any()
    assert (found.labels == 2).all()
    assert torch.equal(found.original_labels, test.labels[found.index])
    assert torch.equal(found.images, trigger.apply(test.images[found.index], found.index, "test"))
    whole = trigger_test_set(test, ToyTrigger(), label_map(ToyTrigger(), ALL, K))
    assert torch.equal(whole.index, torch.arange(100))
    assert torch.equal(whole.labels, (test.labels + 1) % K)
    alone = test[test.labels == 2]
    assert len(trigger_test_set(alone, trigger, label_map(trigger, ONE, K)).index) == 0


class Covered(ToyTrigger):
    """Two cover samples for each poisoned one, which turn black."""

    name, cross_ratio = "covered", 2.0

    def stamp_cover(self, x, index):
        return x * 0


def test_cover_samples_keep_their_labels_and_are_never_poison():
    found, plain = poison(trigger=Covered()), poison(trigger=Covered(), seed=1)
    cover, hit = found.roles == Role.COVER, found.poison_indicator
    assert (int(hit.sum()), int(cover.sum())) == (10, 20)
    assert not (cover & hit).any()
    assert torch.equal(found.data.labels[~hit], data().labels[~hit])
    assert (found.data.images[cover] == 0).all()
    assert torch.equal(
        found.data.images[found.roles == Role.CLEAN], data().images[found.roles == Role.CLEAN]
    )
    assert not torch.equal(plain.roles == Role.COVER, cover)
    with pytest.raises(
        UserError,
        match=r"cross_ratio: 2 cover samples for each of 34 poisoned are 68, but only 66 images",
    ):
        poison(replace(ONE, pratio=0.34), Covered())


def test_poison_images_are_rounded_and_clamped_never_truncated_or_wrapped():
    class Shift(Trigger):
        def stamp(self, x, index, split):
            return x + torch.tensor([0.6, -0.6, 300.0])[:, None, None] / 255

    images = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1)
    out = Shift().apply(images, torch.arange(256))[..., 0, 0].long()
    level = torch.arange(256)
    assert torch.equal(out[:, 0], (level + 1).clamp(max=255))
    assert torch.equal(out[:, 1], (level - 1).clamp(min=0))
    assert (out[:, 2] == 255).all()


def test_triggers_see_original_indices_and_the_split_in_any_order(monkeypatch):
    class Spy(Trigger):
        name = "spy"

        def stamp(self, x, index, split):
            return (x * 0 + index[:, None, None, None] + 100 * (split == "test")) / 255

    found = poison(ONE, Spy())
    index = found.poison_indicator.nonzero().flatten()
    assert torch.equal(found.data.images[index][:, 0, 0, 0].long(), index)
    test = trigger_test_set(data(), Spy(), LabelMap(K, 2))
    assert torch.equal(test.images[:, 0, 0, 0].long(), test.index + 100)
    shuffled, whole = torch.randperm(100), Spy().apply(data().images, torch.arange(100))
    for batch in (1, 7, 64, 512):
        monkeypatch.setattr("attack.poisoning.trigger.BATCH", batch)
        assert torch.equal(Spy().apply(data().images[shuffled], shuffled), whole[shuffled])
    assert Spy().apply(data().images[:0], shuffled[:0]).shape == (0, 3, 4, 4)
