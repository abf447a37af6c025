"""DataElixir: Zhou et al., "Purifying Poisoned Dataset to Mitigate Backdoor Attacks via Diffusion
Models", AAAI 2024, https://arxiv.org/abs/2312.11057

Every sample is purified into intermediary images, and the victim votes on each. Samples whose votes
leave their given label, in a class whose votes leave it far more than other classes' do, are
poisoned: they take the label that the intermediaries agree on and one of these images. Where the
intermediaries disagree, a model trained on the rest decides.

As a script: defend an existing record again, with other keys
(python defense/dataelixir.py --result_file NAME).
"""

from __future__ import annotations

from dataclasses import dataclass

from defense.elixir.config import DataElixirConfig
from defense.harness.command import main
from defense.harness.defense import Defense
from defense.harness.knowledge import DENOISER


@dataclass(frozen=True)
class DataElixir(DataElixirConfig, Defense):
    __doc__ = DataElixirConfig.__doc__
    KNOWLEDGE = (DENOISER,)

    def defend(self, data, victim, run):
        """Sanitize `data` and train a benign model on the result, in the paper's order.

        Ours, and without a say under `preset: published`: targets first (in purify) and the inflow
        (in target_labels). Ours as well: a noise level found by `steps_T: auto`, and assess.
        """
        from defense.elixir.assessment import assess
        from defense.elixir.draft import Draft, Selector
        from defense.elixir.purification import purify
        from defense.elixir.verdict import filter_candidates, first_verdicts

        config, rules = self.resolved(), self.rules
        with run.record.stage("purify"):
            # Purify: n rounds of noise up to level T and back; the last m states of each are kept.
            purified = purify(data, victim, config, run.dataset, run.record)
            # Vote: the victim's label of every image and of each of its intermediaries.
            votes = purified.votes()
            # Filter: labels that fewer than tau intermediaries hold are purification noise.
            candidates = filter_candidates(votes, config.threshold_tau)
            # Target labels: classes whose moved samples lose their label far more than others' do.
            found = purified.target_labels(votes, candidates)
            # Verdicts, under a target label: moved to one label is POISONED, mixed is SUSPICIOUS.
            verdict = first_verdicts(candidates.kind, data.labels, found.is_target)
            # Select: a POISONED image becomes the one that lies farther off than 4 of 5 candidates.
            selector = Selector(purified.store, victim, rules)
            draft = Draft.unchanged(data, verdict, rules.truncate)
            draft = selector.take_poisoned(draft, candidates)
            worth = assess(votes, found, draft, purified.level, config, run.dataset.classes)
        final, stage1, benign = draft, None, victim
        if found.targets or rules.always_train:
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
        else:
            run.keep(victim)
        return outcome(final, benign, stage1, votes, found, selector, worth)

    def _train(self, name, data, config, run, start=None):
        """A classifier of this defence; by one process, as verdicts must not depend on how many."""
        from utils.classifier.models import trained

        folder, observer = run.record.path, run.observer
        return trained(
            name, data, config, run.dataset, run.device, folder, observer, start, together=False
        )

    def check(self, dataset):
        """Raises UserError where the denoiser cannot serve these images and this noise level, or
        there are too few classes to compare."""
        from defense.elixir.power import refuse_few_classes
        from defense.elixir.purifier import open_denoiser

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


def outcome(final, model, stage1, votes, found, selector, worth):
    """What was decided, as every defence gives it back."""
    import torch

    from defense.elixir.verdict import UNKNOWN
    from defense.harness.result import Result
    from utils.images.data import LabeledImages

    cast = votes[:, 1:] != UNKNOWN
    moved = (cast & (votes[:, 1:] != final.given[:, None])).sum(1).double()
    left = moved / cast.sum(1).clamp(min=1)  # 0 where nothing was purified
    return Result(
        model,
        LabeledImages(final.images, final.labels),
        flagged=final.labels != final.given,
        # Without a target label, who leaves the given one is most likely the victim's mistake.
        score=torch.where(found.is_target[final.given], left, left / 2),
        targets=found.targets,
        decisions=final.decisions(votes, found.is_target),
        stage1=stage1,
        discrepancy=found,
        votes=votes,
        power=worth.power,
        notes=worth.notes,
        unet_passes=selector.store.passes,
        examples=selector.examples,
    )


if __name__ == "__main__":
    main("dataelixir")
