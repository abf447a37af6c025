"""DataElixir: Zhou et al., "Purifying Poisoned Dataset to Mitigate Backdoor Attacks via Diffusion Models", AAAI 2024,
https://arxiv.org/abs/2312.11057

Every sample is purified into intermediary images, and the victim votes on each. Samples whose votes leave their given
label, in a class whose votes leave it far more than other classes', are poisoned: they take the label that the
intermediaries agree on and one of these images. Where the intermediaries disagree, a model trained on the rest decides.

As a script: defend an existing record again, with other keys (python defense/dataelixir.py --result_file NAME).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from defense.elixir.config import DataElixirConfig
from defense.elixir.denoising_check import warn_if_noise
from defense.elixir.draft import Draft, Selector
from defense.elixir.forecast import announced_pace, smallest
from defense.elixir.noise_level import rounds_survived, self_agreement, settled_level
from defense.elixir.power import COMPARABLE, detection_power
from defense.elixir.purification import Purification
from defense.elixir.purifier import open_denoiser, requantised
from defense.elixir.rounds import PurificationPlan
from defense.elixir.store import IntermediaryStore
from defense.elixir.target_label import Discrepancy
from defense.elixir.verdict import UNKNOWN, Candidates, Verdict, filter_candidates, first_verdicts
from defense.elixir.verdict_notes import verdict_notes
from defense.elixir.workers import workers_for
from defense.harness.defense import Defense
from defense.harness.knowledge import DENOISER
from defense.harness.result import Result
from utils.classifier.models import save_classifier, trained
from utils.classifier.training import Observer
from utils.config import UserError
from utils.images.data import Dataset, LabeledImages
from utils.late import Tensor, torch
from utils.storage.record import Record

if TYPE_CHECKING:
    from utils.classifier.networks import Classifier

log = logging.getLogger("dataelixir")
KNOWLEDGE = (DENOISER,)


def check(config: DataElixirConfig, dataset: Dataset) -> None:
    """Fail early: raises UserError where the denoiser cannot serve this data set and noise level, or there are too few classes to compare."""
    refuse_few_classes(dataset.num_classes, "dataset")
    open_denoiser(config.resolved(), dataset.train.images.shape[-1], dataset.name)


def refuse_few_classes(count: int, key: str) -> None:
    """Raises UserError, in the name of `key`, where there are too few classes for one to be told from the median one."""
    if count < COMPARABLE:
        raise UserError(
            f"{key}: {count} classes; DataElixir tells a target label by how far it lies from the median class, which takes three or more"
        )


def defend(
    data: LabeledImages,
    victim: Classifier,
    config: DataElixirConfig,
    dataset: Dataset,
    record: Record,
    observer: Observer | None = None,
) -> Result:
    """Sanitize `data` and train a benign model on the result.

    Args:
        data: the training set as received; nothing else is known about it.
        victim: a classifier trained on it, in eval mode.
        config: keys of this defence.
        dataset: name, classes and normalisation of the data (its images are not looked at).
        record: where intermediate results and models are kept, so that an interrupted defence goes on.
        observer: told of every training epoch.

    Raises:
        UserError: see `check`, and whatever stops a training.
    """
    config = config.resolved()
    train = partial(
        trained,
        config=config,
        dataset=dataset,
        device=victim.device,
        folder=record.path,
        observer=observer,
        together=False,
    )
    with record.stage("purify"):
        purification, found = purify(data, victim, config, dataset, record)
        votes, store = purification.votes(), purification.store
        candidates = filter_candidates(votes, config.threshold_tau)
        selector = Selector(
            store, victim, config.ssim == "volume", config.selection_rank, config.original_eligible
        )
        draft = selector.take_poisoned(_first_draft(data, candidates, found, config), candidates)
        _log_decisions(votes, data.labels, found, draft, config.last_steps_m)
    power = (
        None
        if found.targets
        else detection_power(
            votes, data.labels, found, config.threshold_tau, config.target_rule, config.random_seed
        )
    )
    survived = rounds_survived(votes, data.labels, config.last_steps_m, found.is_target).tolist()
    notes = verdict_notes(
        found, survived, purification.rounds.purifier.config.steps_T, power, dataset.classes
    )
    result = partial(
        _result,
        votes=votes,
        found=found,
        passes=store.passes,
        selector=selector,
        power=power,
        notes=notes,
    )
    if not found.targets and not config.conform:
        log.info("no backdoor found: no label is changed, and the victim is the benign model")
        save_classifier(victim, record / "benign.safetensors")
        return result(draft, victim, None)
    with record.stage("stage1"):
        stage1 = train("benign_stage1", draft.rows(~draft.suspicious))
    with record.stage("finetune"):
        settle = partial(
            selector.settle_suspicious, candidates=candidates, source=config.relabel_source
        )
        settled, consensus = settle(draft, stage1)
        benign = train(
            "benign",
            settled.rows(~settled.suspicious | consensus),
            config=config.of_fine_tuning,
            start=stage1,
        )
        final, _ = settle(draft, benign)
    return result(final, benign, stage1)


def purify(
    data: LabeledImages,
    victim: Classifier,
    config: DataElixirConfig,
    dataset: Dataset,
    record: Record,
) -> tuple[Purification, Discrepancy]:
    """Intermediaries and votes of as many samples as the decisions need, and the target labels.

    Votes of samples that were not purified are UNKNOWN; that makes them UNANIMOUS, and benign.
    """
    if config.rounds_n * config.last_steps_m < 2 * config.threshold_tau:
        log.warning(
            "threshold_tau: of %d x %d intermediaries no two labels can have %d votes each, so no sample will be SUSPICIOUS; take at most %d",
            config.rounds_n,
            config.last_steps_m,
            config.threshold_tau,
            max(1, config.rounds_n * config.last_steps_m // 2),
        )
    denoiser = open_denoiser(config, data.images.shape[-1], dataset.name).to(victim.device)
    store, unfinished = IntermediaryStore(record / "purify"), "purify" not in record.finished()
    level = settled_level(
        config,
        denoiser,
        data,
        victim,
        dataset.num_classes,
        config.random_seed,
        config.amp,
        store.folder,
    )
    if unfinished:
        warn_if_noise(denoiser, data.images, level, config.random_seed, victim.device)
    with workers_for(
        PurificationPlan(
            data, victim, denoiser, replace(config, steps_T=level), _expected(data, config)
        )
    ) as workers:
        pace = announced_pace(workers.work, smallest(data.labels, config)) if unfinished else None
        purification = Purification(
            data, workers.work, store, config.target_rule, dataset.num_classes, workers.blocks, pace
        )
        if config.end_early is not None:
            found = purification.ending_early(
                config.sample_first,
                config.sample_error,
                config.end_early,
                others=not config.target_first,
            )
        elif config.target_first:
            found = purification.targets_first(config.sample_first, config.sample_error)
        else:
            found = purification.everything()
    return purification, found


def _expected(data: LabeledImages, config: DataElixirConfig) -> int:
    """About how many images will be purified: the sample, and one class if it is a target label."""
    return min(len(data), smallest(data.labels, config) + len(data) // len(data.labels.unique()))


def _first_draft(
    data: LabeledImages, candidates: Candidates, found: Discrepancy, config: DataElixirConfig
) -> Draft:
    draft = Draft.unchanged(data, first_verdicts(candidates.kind, data.labels, found.is_target))
    if config.index0 == "requantised":
        return replace(draft, images=requantised(data.images))
    return draft


def _result(
    draft: Draft,
    model: Classifier,
    stage1: Classifier | None,
    votes: Tensor,
    found: Discrepancy,
    passes: int,
    selector: Selector,
    power: dict[str, float] | None,
    notes: tuple[str, ...],
) -> Result:
    purified = LabeledImages(draft.images, draft.labels)
    cast = votes[:, 1:] != UNKNOWN
    left = (cast & (votes[:, 1:] != draft.given[:, None])).sum(1).double() / cast.sum(1).clamp(
        min=1
    )  # 0 where nothing was purified
    score = torch.where(
        found.is_target[draft.given], left, left / 2
    )  # without a target label, most likely the victim's mistake
    return Result(
        model,
        purified,
        flagged=draft.labels != draft.given,
        score=score,
        targets=found.targets,
        decisions=draft.decisions(votes, found.is_target),
        stage1=stage1,
        discrepancy=found,
        votes=votes,
        power=power,
        notes=notes,
        unet_passes=passes,
        examples=selector.examples,
    )


def _log_decisions(
    votes: Tensor, labels: Tensor, found: Discrepancy, draft: Draft, last_steps_m: int
) -> None:
    for line in self_agreement(votes, labels, last_steps_m, found.is_target):
        log.info(line)
    for label, row in enumerate(
        zip(found.evidence, found.metric, found.score, found.inflow.share, found.inflow_score)
    ):
        log.info(
            "class %d: %d samples moved, discrepancy %.3f, score %.2f, taken in %.4f of the others, score %.2f%s",
            label,
            *row,
            "  <- target label" if label in found.targets else "",
        )
    log.info(
        "verdicts: %s", ", ".join(f"{int((draft.verdict == v).sum())} {v.name}" for v in Verdict)
    )


def clean_up(config: DataElixirConfig, record: Record) -> None:
    """After a complete run: the intermediaries' files go, unless they are to be kept."""
    if not config.keep_intermediaries and (record / "purify").exists():
        IntermediaryStore(record / "purify").discard()


@dataclass(frozen=True)
class DataElixir(DataElixirConfig, Defense):
    """DataElixir: purification, decisions, benign model."""

    KNOWLEDGE = KNOWLEDGE

    def check(self, dataset):
        check(self, dataset)

    def costs(self, data, dataset):
        from defense.elixir.forecast import purifying_line

        config, trainings = self.resolved(), "stage1 and finetune, if a backdoor is found"
        return [
            purifying_line(data, config, dataset),
            config.training_cost(trainings, data, dataset),
        ]

    def defend(self, data, victim, run):
        return defend(data, victim, self, run.dataset, run.record, run.observer)

    def clean_up(self, record):
        clean_up(self, record)


if __name__ == "__main__":
    from defense.harness.command import main

    main("dataelixir")
