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
from typing import TYPE_CHECKING, Literal, Optional

from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt

from defense.crew import crew_for
from defense.denoising import warn_if_noise
from defense.doubt import verdict_notes
from defense.draft import Draft, Selector
from defense.forecast import announced_pace, smallest
from defense.knowledge import DENOISER
from defense.level import rounds_survived, self_agreement, settled_level
from defense.power import COMPARABLE, detection_power
from defense.purification import Purification
from defense.purifier import PurifyConfig, open_denoiser, requantised
from defense.result import Result
from defense.rounds import Recipe
from defense.store import IntermediaryStore
from defense.target_label import PUBLISHED_RULE, Discrepancy, TargetRule
from defense.verdict import UNKNOWN, Candidates, Verdict, filter_candidates, first_verdicts
from utils.config import Fraction, OpenFraction, TrainConfig, UserError
from utils.data import Dataset, LabeledImages
from utils.late import Tensor, torch
from utils.models import save_classifier
from utils.record import Record
from utils.trained import trained
from utils.training import Observer

if TYPE_CHECKING:
    from diffusion.denoiser import Denoiser
    from utils.networks import Classifier

log = logging.getLogger("dataelixir")
KNOWLEDGE = (DENOISER,)
PUBLISHED = dict(noise_index="T", quantise="truncate", index0="requantised", ssim="volume", outliers="two_sided", outlier_threshold=PUBLISHED_RULE.threshold,
                 evidence_prior=PUBLISHED_RULE.evidence_prior, mad_floor=PUBLISHED_RULE.mad_floor, inflow_threshold=PUBLISHED_RULE.inflow_threshold,
                 original_eligible=True, selection_rank=0.8, relabel_source="raw", sampler="ancestral", reverse_steps=None, amp=False, compile="off",
                 target_first=False, end_early=None)


@dataclass(frozen=True)
class DataElixirConfig(TrainConfig, PurifyConfig):
    """The defence: purification, decisions, benign model.

    Args:
        threshold_tau: votes that a second label needs among the intermediaries to count as disagreement.
        ft_lr: learning rate of fine-tuning on the settled set.
        ft_epochs: epochs of fine-tuning; null = epochs.
        conform: decide exactly as the published code does with the given steps_T, rounds_n, last_steps_m and threshold_tau; overrides the keys from outliers to end_early, and noise_index, quantise, sampler, reverse_steps, amp, compile.
        outliers: a target label is an outlier on one_sided (more discrepant than the median class) or two_sided (as published; also flags unusually clean classes).
        outlier_threshold: robust standard deviations from the median class beyond which a class is a target label.
        evidence_prior: share of every class counted as extra samples that did not move, so that a class with hardly any moved sample is not flagged (published 0).
        mad_floor: least median absolute deviation in nats that the outlier test divides by (published 0).
        inflow_threshold: robust standard deviations from the median class beyond which the share of other classes' samples that a class has taken in makes it a target label too; null = never (as published).
        ssim: pixel distance by SSIM averaged over each channel, or over the image as a volume (as published under scikit-image 0.24).
        original_eligible: whether the original, possibly triggered image may be chosen as its own purified image (published true).
        selection_rank: the chosen image is farther from the original than this share of its candidates.
        index0: images that stay are kept as original bytes, or requantised like purified ones (as published).
        relabel_source: the benign model settles a doubtful sample by its raw image (as published), by its purified images (most common label), or by these where it reads the raw image as the given label.
        target_first: purify a sample of each class until the target labels are known, then only the classes that they name; else everything (as published).
        sample_first: images of each class in the first sample.
        sample_error: the sample grows while a class's verdict comes out differently in more than this share of bootstrap resamples.
        end_early: once the target labels are known, end a sample's rounds when its verdict cannot change any more (0), or would for at most this share of samples like it, as measured on the first sample; null = never (as published).
        keep_intermediaries: keep the intermediaries' files after the run (157 KB for each anomalous 32x32 image); otherwise only their votes stay.
    """

    threshold_tau: PositiveInt = 5
    ft_lr: PositiveFloat = 0.002
    ft_epochs: Optional[PositiveInt] = None
    conform: bool = False
    outliers: Literal["one_sided", "two_sided"] = "one_sided"
    outlier_threshold: PositiveFloat = 2.0
    evidence_prior: NonNegativeFloat = 0.05
    mad_floor: NonNegativeFloat = 0.2
    inflow_threshold: Optional[PositiveFloat] = 4.0
    ssim: Literal["channel", "volume"] = "channel"
    original_eligible: bool = False
    selection_rank: Fraction = 0.8
    index0: Literal["original", "requantised"] = "original"
    relabel_source: Literal["raw_then_purified", "purified", "raw"] = "raw_then_purified"
    target_first: bool = True
    sample_first: PositiveInt = 64
    sample_error: OpenFraction = 0.02
    end_early: Optional[Fraction] = None
    keep_intermediaries: bool = False

    def resolved(self) -> "DataElixirConfig":
        """This config with the published decisions in place where `conform` is set."""
        return replace(self, **PUBLISHED) if self.conform else self

    @property
    def of_fine_tuning(self) -> "DataElixirConfig":
        """This config with the epochs and learning rate of the fine-tuning."""
        return replace(self, lr=self.ft_lr, epochs=self.ft_epochs or self.epochs)

    @property
    def target_rule(self) -> TargetRule:
        return TargetRule(self.outliers == "two_sided", self.outlier_threshold, self.evidence_prior, self.mad_floor, self.inflow_threshold)


Config = DataElixirConfig


def check(config: DataElixirConfig, dataset: Dataset) -> None:
    """Fail early: raises UserError where the denoiser cannot serve this data set and noise level, or there are too few classes to compare."""
    refuse_few_classes(dataset.num_classes, "dataset")
    open_denoiser(config.resolved(), dataset.train.images.shape[-1], dataset.name)


def refuse_few_classes(count: int, key: str) -> None:
    """Raises UserError, in the name of `key`, where there are too few classes for one to be told from the median one."""
    if count < COMPARABLE:
        raise UserError(f"{key}: {count} classes; DataElixir tells a target label by how far it lies from the median class, which takes three or more")


def defend(data: LabeledImages, victim: Classifier, config: DataElixirConfig, dataset: Dataset, record: Record,
           observer: Optional[Observer] = None) -> Result:
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
    train = partial(trained, config=config, dataset=dataset, device=victim.device, folder=record.path, observer=observer, together=False)
    with record.stage("purify"):
        purification, found = purify(data, victim, config, dataset, record)
        votes, store = purification.votes(), purification.store
        candidates = filter_candidates(votes, config.threshold_tau)
        selector = Selector(store, victim, config.ssim == "volume", config.selection_rank, config.original_eligible)
        draft = selector.take_poisoned(_first_draft(data, candidates, found, config), candidates)
        _log_decisions(votes, data.labels, found, draft, config.last_steps_m)
    power = None if found.targets else detection_power(votes, data.labels, found, config.threshold_tau, config.target_rule, config.random_seed)
    survived = rounds_survived(votes, data.labels, config.last_steps_m, found.is_target).tolist()
    notes = verdict_notes(found, survived, purification.rounds.purifier.config.steps_T, power, dataset.classes)
    result = partial(_result, votes=votes, found=found, passes=store.passes, selector=selector, power=power, notes=notes)
    if not found.targets and not config.conform:
        log.info("no backdoor found: no label is changed, and the victim is the benign model")
        save_classifier(victim, record / "benign.safetensors")
        return result(draft, victim, None)
    with record.stage("stage1"):
        stage1 = train("benign_stage1", draft.rows(~draft.suspicious))
    with record.stage("finetune"):
        settle = partial(selector.settle_suspicious, candidates=candidates, source=config.relabel_source)
        settled, consensus = settle(draft, stage1)
        benign = train("benign", settled.rows(~settled.suspicious | consensus), config=config.of_fine_tuning, start=stage1)
        final, _ = settle(draft, benign)
    return result(final, benign, stage1)


def purify(data: LabeledImages, victim: Classifier, config: DataElixirConfig, dataset: Dataset,
           record: Record) -> tuple[Purification, Discrepancy]:
    """Intermediaries and votes of as many samples as the decisions need, and the target labels.

    Votes of samples that were not purified are UNKNOWN; that makes them UNANIMOUS, and benign.
    """
    if config.rounds_n * config.last_steps_m < 2 * config.threshold_tau:
        log.warning("threshold_tau: of %d x %d intermediaries no two labels can have %d votes each, so no sample will be SUSPICIOUS; take at most %d",
                    config.rounds_n, config.last_steps_m, config.threshold_tau, max(1, config.rounds_n * config.last_steps_m // 2))
    denoiser = open_denoiser(config, data.images.shape[-1], dataset.name).to(victim.device)
    store, unfinished = IntermediaryStore(record / "purify"), "purify" not in record.finished()
    level = settled_level(config, denoiser, data, victim, dataset.num_classes, config.random_seed, config.amp, store.folder)
    if unfinished:
        warn_if_noise(denoiser, data.images, level, config.random_seed, victim.device)
    with crew_for(Recipe(data, victim, denoiser, replace(config, steps_T=level), _expected(data, config))) as crew:
        pace = announced_pace(crew.work, smallest(data.labels, config)) if unfinished else None
        purification = Purification(data, crew.work, store, config.target_rule, dataset.num_classes, crew.blocks, pace)
        if config.end_early is not None:
            found = purification.ending_early(config.sample_first, config.sample_error, config.end_early, others=not config.target_first)
        elif config.target_first:
            found = purification.targets_first(config.sample_first, config.sample_error)
        else:
            found = purification.everything()
    return purification, found


def _expected(data: LabeledImages, config: DataElixirConfig) -> int:
    """About how many images will be purified: the sample, and one class if it is a target label."""
    return min(len(data), smallest(data.labels, config) + len(data) // len(data.labels.unique()))


def _first_draft(data: LabeledImages, candidates: Candidates, found: Discrepancy, config: DataElixirConfig) -> Draft:
    draft = Draft.unchanged(data, first_verdicts(candidates.kind, data.labels, found.is_target))
    if config.index0 == "requantised":
        return replace(draft, images=requantised(data.images))
    return draft


def _result(draft: Draft, model: Classifier, stage1: Optional[Classifier], votes: Tensor, found: Discrepancy, passes: int,
            selector: Selector, power: Optional[dict[str, float]], notes: tuple[str, ...]) -> Result:
    purified = LabeledImages(draft.images, draft.labels)
    cast = votes[:, 1:] != UNKNOWN
    left = (cast & (votes[:, 1:] != draft.given[:, None])).sum(1).double() / cast.sum(1).clamp(min=1)   # 0 where nothing was purified
    score = torch.where(found.is_target[draft.given], left, left / 2)   # without a target label, most likely the victim's mistake
    return Result(model, purified, flagged=draft.labels != draft.given, score=score, targets=found.targets,
                  decisions=draft.decisions(votes, found.is_target), stage1=stage1, discrepancy=found, votes=votes, power=power, notes=notes,
                  unet_passes=passes, examples=selector.examples)


def _log_decisions(votes: Tensor, labels: Tensor, found: Discrepancy, draft: Draft, last_steps_m: int) -> None:
    for line in self_agreement(votes, labels, last_steps_m, found.is_target):
        log.info(line)
    for label, row in enumerate(zip(found.evidence, found.metric, found.score, found.inflow.share, found.inflow_score)):
        log.info("class %d: %d samples moved, discrepancy %.3f, score %.2f, taken in %.4f of the others, score %.2f%s", label, *row,
                 "  <- target label" if label in found.targets else "")
    log.info("verdicts: %s", ", ".join(f"{int((draft.verdict == v).sum())} {v.name}" for v in Verdict))


def clean_up(config: DataElixirConfig, record: Record) -> None:
    """After a complete run: the intermediaries' files go, unless they are to be kept."""
    if not config.keep_intermediaries and (record / "purify").exists():
        IntermediaryStore(record / "purify").discard()


if __name__ == "__main__":
    from defense.run import main

    main("dataelixir")
