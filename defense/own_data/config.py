"""The keys of defense/purify.py, beside those of training, purification and DataElixir."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from utils.images.layout import Keys

from utils.config import ReadConfig


@dataclass(frozen=True)
class CleanConfig(ReadConfig):
    """Which set is cleaned, and what becomes of it.

    Args:
        data: folder of class folders or with a table (.csv, .tsv), .npz file, folder of parquet
            files, of `save_to_disk`, of webdataset's .tar or of CIFAR's python files, or name of a
            record.
        out: new folder for the cleaned set, the decisions and the page; a run that was interrupted
            goes on in its own. The same command again leaves cleaned/ as it is, another action puts
            it aside as cleaned-1/.
        split: the part to be cleaned, where the data come as several; the others are copied.
        image_column: the column of a table that holds images or names files; empty to find it.
        label_column: the column of a table that holds labels; empty to find it.
        victim: a classifier (.safetensors of this program, of the kind that `model` names) instead
            of one trained on the set.
        action: relabel (purified images under their new labels, without the samples that the model
            is not sure of), drop (leave all samples under suspicion out) or report (write no
            images).
        resize: analyse images of other sizes at the denoiser's; only purified ones are affected,
            they are scaled back.
        dry_run: count, measure a small batch and say what the run would cost, without writing
            anything.
    """

    data: str = ""
    out: str = ""
    split: str = "train"
    image_column: str = ""
    label_column: str = ""
    victim: str | None = None
    action: Literal["relabel", "drop", "report"] = "relabel"
    resize: bool = False
    dry_run: bool = False

    @property
    def keys(self) -> Keys:
        """What the user says about the layout of the data."""
        from utils.images.layout import Keys

        return Keys(self.split, self.image_column, self.label_column)
