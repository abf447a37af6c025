"""DataElixir: Zhou et al., "Purifying Poisoned Dataset to Mitigate Backdoor Attacks via Diffusion
Models", AAAI 2024, https://arxiv.org/abs/2312.11057

By cause, the default: samples are purified, the victim votes on what comes out, and what was taken
away is pasted on images of other classes. Classes whose samples lose their label, or whose
residuals impose it, are accused; the victim's own features tell who of them carries the trigger. A
model that is taught on the rest that the trigger means nothing reads the labels.

By votes, as published: a sample whose votes leave its given label, in a class whose votes leave it
far more than other classes' do, is poisoned. It takes the label that the intermediaries agree on
and one of these images; where they disagree, a model trained on the rest decides.

As a script: defend an existing record again, with other keys
(python defense/dataelixir.py --result_file NAME).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from defense.elixir.config import DataElixirConfig
from defense.harness.command import main
from defense.harness.defense import Defense
from defense.harness.knowledge import DENOISER


@dataclass(frozen=True)
class DataElixir(DataElixirConfig, Defense):
    __doc__ = DataElixirConfig.__doc__
    KNOWLEDGE = (DENOISER,)

    def defend(self, data, victim, run):
        """Sanitize `data` and train a benign model on the result: by cause, or as published."""
        by = self.by_votes if self.preset == "published" else self.by_cause
        return by(data, victim, run)

    def by_cause(self, data, victim, run):
        """The default: accuse by cause, split by features, teach immunity (docs/method.md)."""
        import torch

        from defense.elixir.assessment import assess
        from defense.elixir.decisions import Cause
        from defense.elixir.draft import Draft, Selector
        from defense.elixir.exhibit import exhibit
        from defense.elixir.immunity import Immunity
        from defense.elixir.purification import purify
        from defense.elixir.settlement import TEACHES, held_out, read_accused
        from defense.elixir.verdict import filter_candidates
        from utils.images.data import LabeledImages

        config, seed = self.resolved(), self.random_seed
        with run.record.stage("purify") as notes:
            # Purify, and paste what that took away on images of other classes.
            purified = purify(data, victim, config, run.dataset, run.record)
            # Vote: the victim's label of every image and of each of its intermediaries.
            votes = purified.votes()
            # Accuse: classes whose samples lose their label, or whose residuals impose it.
            found = purified.target_labels(votes, filter_candidates(votes, config.threshold_tau))
            worth = assess(votes, found, data.labels, purified.level, config, run.dataset.classes)
            # Split: the victim's features tell who of an accused class carries the trigger.
            groups = purified.groups(votes, found)
            notes |= noted(found) | ({} if found.targets else {"skipped": ["stage1", "finetune"]})
        if not found.targets:
            run.keep(victim)
            draft = Draft.unchanged(data, torch.zeros_like(data.labels))
            cause = Cause.unread(purified.store.pasted(len(data)))
            return outcome(draft, victim, None, votes, found, purified.store, worth, cause)
        bank, residuals = purified.store.residuals(groups.carriers.nonzero().flatten())
        carried, obeyed = data.labels[bank], purified.obedience(found)
        immunity = Immunity.of(residuals, carried, run.dataset.num_classes, obeyed)
        measured = held_out(groups, seed)
        learned, read = groups.trusted & ~measured, (data, groups, measured, immunity, seed)
        with run.record.stage("stage1"):
            # Stage 1: a fresh model learns what is trusted, and that residuals mean nothing.
            stage1 = self._train("benign_stage1", data[learned], config, run, None, immunity)
        with run.record.stage("finetune"):
            # Settle: it reads the accused classes' images; what it is sure of joins.
            reading = read_accused(stage1, *read, data.labels[learned])
            kept = (reading.labels == data.labels) & groups.carriers
            taught = reading.sure(TEACHES) & ~kept & ~measured
            labels = data.labels.where(learned, reading.labels)
            joined = LabeledImages(data.images, labels)[learned | taught]
            # Fine-tune: on all of that it becomes the benign model, and settles them for good.
            recipe = config.of_fine_tuning
            benign = self._train("benign", joined, recipe, run, stage1, immunity)
            reading = read_accused(benign, *read, joined.labels)
            draft = Draft.settled(data, groups, reading)
            # Select: a purified image that the benign model reads as the label.
            draft = Selector(purified.store, victim, self.rules).take_as_read(draft, benign)
        cause = Cause(purified.store.pasted(len(data)), groups.carrier, reading.confidence)
        result = outcome(draft, benign, stage1, votes, found, purified.store, worth, cause)
        return replace(result, exhibit=exhibit(purified, votes, groups, found))

    def by_votes(self, data, victim, run):
        """As published, in the paper's order."""
        from defense.elixir.assessment import assess
        from defense.elixir.draft import Draft, Selector
        from defense.elixir.purification import purify
        from defense.elixir.verdict import filter_candidates, first_verdicts

        config, rules = self.resolved(), self.rules
        with run.record.stage("purify") as notes:
            # Purify: n rounds of noise up to level T and back; the last m states of each are kept.
            purified = purify(data, victim, config, run.dataset, run.record)
            # Vote: the victim's label of every image and of each of its intermediaries.
            votes = purified.votes()
            # Filter: labels that fewer than tau intermediaries hold are purification noise.
            candidates = filter_candidates(votes, config.threshold_tau)
            # Target labels: classes whose moved samples lose their label far more than others' do.
            found = purified.target_labels(votes, candidates)
            worth = assess(votes, found, data.labels, purified.level, config, run.dataset.classes)
            # Verdicts, under a target label: moved to one label is POISONED, mixed is SUSPICIOUS.
            verdict = first_verdicts(candidates.kind, data.labels, found.is_target)
            # Select: a POISONED image becomes the one that lies farther off than 4 of 5 candidates.
            selector = Selector(purified.store, victim, rules)
            draft = Draft.unchanged(data, verdict, rules.truncate)
            draft = selector.take_poisoned(draft, candidates)
            notes |= noted(found)
        with run.record.stage("stage1"):
            # Stage 1: a fresh model learns everything that is not SUSPICIOUS.
            stage1 = self._train("benign_stage1", draft.rows(~draft.suspicious), config, run)
        with run.record.stage("finetune"):
            # Settle: it reads the SUSPICIOUS ones; where the votes agree with it, they join.
            settled, agreed = selector.settle_suspicious(draft, stage1, candidates)
            joined = settled.rows(~settled.suspicious | agreed)
            # Fine-tune: on all of that it becomes the benign model, and settles them for good.
            benign = self._train("benign", joined, config.of_fine_tuning, run, stage1)
            final, _ = selector.settle_suspicious(draft, benign, candidates)
        return outcome(final, benign, stage1, votes, found, purified.store, worth)

    def _train(self, name, data, config, run, start=None, augment=None):
        """A classifier of this defence; by one process, as verdicts must not depend on how many."""
        from utils.classifier.models import trained

        where, how = (run.dataset, run.device, run.record.path), (run.observer, start)
        return trained(name, data, config, *where, *how, together=False, augment=augment)

    def check(self, dataset):
        """Raises UserError where the denoiser cannot serve these images and this noise level, or
        there are too few classes to compare."""
        from defense.elixir.power import refuse_few_classes
        from defense.elixir.purifier import open_denoiser

        if self.preset == "published":
            refuse_few_classes(dataset.num_classes, "dataset")
        open_denoiser(self.resolved(), dataset.train.images.shape[-1], dataset.name)

    def costs(self, data, dataset):
        from defense.elixir.forecast import purifying_line

        config, trainings = self.resolved(), "stage1 and finetune, if a backdoor is found"
        cost = config.training_cost(trainings, data, dataset)
        return [purifying_line(data, config, dataset), cost]

    def clean_up(self, record):
        """The intermediaries' files go, unless they are to be kept."""
        from defense.elixir.store import IntermediaryStore

        if not self.keep_intermediaries and (record / "purify").exists():
            IntermediaryStore(record / "purify").discard()


def noted(found):
    """What is known once the target labels are, for who looks at a run that goes on."""
    return {"target_labels": list(found.targets), "undecided": list(found.undecided)}


def outcome(final, model, stage1, votes, found, store, worth, cause=None):
    """What was decided, as every defence gives it back."""
    import torch

    from defense.elixir.verdict import share_moved
    from defense.harness.result import Result
    from utils.images.data import LabeledImages

    # Without a target label, who leaves the given one is most likely the victim's mistake.
    left = share_moved(votes, final.given)
    score = torch.where(found.is_target[final.given], left, left / 2)
    return Result(
        model,
        LabeledImages(final.images, final.labels),
        keep=~final.left_out if cause else None,
        flagged=(final.labels != final.given) | final.left_out,
        score=score if cause is None else cause.carrier.where(cause.carrier.isfinite(), score),
        targets=found.targets,
        decisions=final.decisions(votes, found.is_target, cause),
        stage1=stage1,
        discrepancy=found,
        votes=votes,
        power=worth.power,
        notes=worth.notes,
        unet_passes=store.passes,
        examples=store.examples,
    )


if __name__ == "__main__":
    main("dataelixir")
