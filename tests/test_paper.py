"""The published decisions, plainly: `preset: published` decides as they do, on random votes.

Zhou et al., AAAI 2024, https://arxiv.org/abs/2312.11057, and its released code.
"""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import nn

from defense import dataelixir
from defense.elixir import purification
from defense.elixir.purification import Purification
from defense.elixir.store import Block, IntermediaryStore
from defense.harness.defense_run import DefenseRun
from tests.toys import INFO, random_images
from utils.classifier import models
from utils.images.data import Dataset, LabeledImages
from utils.storage import record as record_module
from utils.storage.record import Record

CLASSES, EACH, VOTES, TAU = 5, 60, 21, 5


def reference(votes, labels, tau, distance, read):
    """Labels and chosen images of all samples, and those that each stage trains on.

    Args:
        votes: for each sample the victim's labels of its original and its intermediaries.
        labels: the given labels, each class with samples that moved.
        distance: (i, j) -> how far image j of sample i is from its original; 0 for j = 0.
        read: (stage, i) -> the labels that the model of this stage reads in the images of sample i.
    """
    samples, kept, kind, top = range(len(labels)), [], [], []
    for first, *rest in votes:
        ranked = Counter(rest).most_common()  # of equals the first to appear comes first
        top.append(ranked[0][0])
        every = len(ranked) == 1 or ranked[1][1] >= tau
        kept.append([0] + [j for j, vote in enumerate(rest, 1) if every or vote == ranked[0][0]])
        moved = {rest[j - 1] for j in kept[-1][1:]}
        kind.append(
            "unanimous" if moved == {first} else "transition" if len(moved) == 1 else "mixed"
        )
    metric = []
    for c in sorted(set(labels)):
        own = [i for i in samples if labels[i] == c and kind[i] != "unanimous"]
        pool = [votes[i][j] for i in own for j in kept[i]]
        share = pool.count(c) / len(pool)
        metric.append(-math.log(share) if share else math.inf)
    middle = np.median(metric)
    spread = 1.4826 * (np.median([abs(m - middle) for m in metric]) + 1e-6)
    targets = {c for c, m in enumerate(metric) if abs(m - middle) / spread > 2}

    def choose(i, among):
        return sorted(among, key=lambda j: distance(i, j))[int(0.8 * len(among))]

    def settle(stage, i):
        seen = read(stage, i)
        return seen[0], choose(i, [0] + [j for j in range(1, len(seen)) if seen[j] == seen[0]])

    final = {i: (labels[i], 0) for i in samples}
    accused = [i for i in samples if labels[i] in targets]
    final |= {i: (top[i], choose(i, kept[i])) for i in accused if kind[i] == "transition"}
    doubtful = [i for i in accused if kind[i] == "mixed"]
    stage1 = {i: final[i] for i in samples if i not in doubtful}
    settled = {i: settle("benign_stage1", i) for i in doubtful}
    stage2 = stage1 | {i: settled[i] for i in doubtful if settled[i][0] == top[i]}
    final |= {i: settle("benign", i) for i in doubtful}
    return targets, final, stage1, stage2


class PixelReader(nn.Module):
    """Reads a label out of a few pixels, other ones for every name."""

    def __init__(self, name):
        super().__init__()
        self.name, self.device = name, torch.device("cpu")

    def features(self, x):
        return x.mean(dim=(1, 3))

    def forward(self, x):
        row = {"victim": 0, "benign_stage1": 2, "benign": 4}[self.name]
        sums = (x[:, :, row : row + 2].sum(dim=(1, 2, 3)) * 255).round().long()
        return nn.functional.one_hot(sums // 128 % CLASSES, CLASSES).float()


def random_case(seed):
    """Labels, votes and images: one class leaves its label, the others rarely do, many waver."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES), EACH)
    votes = np.repeat(labels[:, None], VOTES, 1)
    often = np.where(labels == seed % CLASSES, 0.9, generator.uniform(0, 0.1, CLASSES)[labels])
    moves = (generator.random(len(labels)) < often)[:, None]
    other = generator.integers(0, CLASSES, (len(labels), 1))
    votes[:, 1:] = np.where(moves, other, votes[:, 1:])
    wavers = generator.random(votes.shape) < generator.choice([0, 0.2, 0.5], (len(labels), 1))
    second = generator.integers(0, CLASSES, (len(labels), 3))
    picked = np.take_along_axis(second, generator.integers(0, 3, votes.shape), 1)
    votes = np.where(wavers, picked, votes)
    images = random_images(len(labels), VOTES, 3, 8, 8, seed=seed)
    images[:, 0] -= ((images[:, 0] > 0) & (images[:, 0] < 64)).byte()  # the published truncation
    return labels, votes, images


@pytest.mark.parametrize("seed", range(8))
def test_the_published_preset_decides_as_the_published_code(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "RECORDS", tmp_path)
    labels, votes, images = random_case(seed)
    given, everyone = torch.from_numpy(labels), torch.arange(len(labels))
    data = LabeledImages(random_images(len(labels), VOTES, 3, 8, 8, seed=seed)[:, 0], given)
    store = IntermediaryStore(tmp_path / "store")
    store.write(Block(everyone, torch.from_numpy(votes), everyone, images, 0))
    asked, victim = {}, PixelReader("victim")

    def purify(data, victim, config, dataset, record):
        assert (config.target_first, config.reverse_steps, config.amp) == (False, None, False)
        rounds = SimpleNamespace(purifier=SimpleNamespace(steps=[99]), paster=None)
        return Purification(data, rounds, store, config.rules.target, CLASSES)

    def trained(name, data, *_, **__):
        asked[name] = sorted(zip(data.labels.tolist(), data.images.flatten(1).tolist()))
        return PixelReader(name)

    monkeypatch.setattr(purification, "purify", purify)
    monkeypatch.setattr(models, "trained", trained)
    defense = dataelixir.DataElixir(preset="published", threshold_tau=TAU, last_steps_m=5)
    dataset = Dataset(data, data[:0], tuple("abcde"), "toy", INFO)
    run = DefenseRun(defense, dataset, Record("run"), victim.device)
    result = defense.defend(data, victim, run)

    def distance(i, j):
        one, other = (images[i, k].permute(1, 2, 0).numpy() for k in (0, j))
        a, b = (victim.features(images[i, k][None].float() / 255)[0].numpy() for k in (0, j))
        cosine = float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))
        alike = structural_similarity(one, other, win_size=3)  # the image as a volume
        return 0.25 * (1 - alike) + 0.25 * (1 - cosine) if j else 0

    def read(stage, i):
        return PixelReader(stage)(images[i].float() / 255).argmax(1).tolist()

    targets, final, *stages = reference(votes.tolist(), labels.tolist(), TAU, distance, read)
    assert set(result.targets) == targets
    assert result.purified.labels.tolist() == [final[i][0] for i in range(len(labels))]
    assert result.decisions.column.tolist() == [final[i][1] for i in range(len(labels))]
    chosen = torch.stack([images[i, final[i][1]] for i in range(len(labels))])
    assert torch.equal(result.purified.images, chosen)
    for name, rows in zip(("benign_stage1", "benign"), stages):
        pairs = [
            (label, images[i, column].flatten().tolist()) for i, (label, column) in rows.items()
        ]
        assert asked[name] == sorted(pairs)
    doubtful = (result.decisions.verdict == 2).sum()
    assert seed % CLASSES in targets
    assert doubtful > 3
    assert len(stages[0]) < len(stages[1]) < len(labels) + (doubtful == 0)
