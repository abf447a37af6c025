"""What lies in a folder of results, read without running anything, for the page of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from utils.config import UserError
from utils.storage.files import shortened

INHERITED = ("poisoned.npz", "truth.npz")
# columns of decisions.csv that hold no numbers
WORDS = ("verdict", "reason", "path", "given_class", "new_class")


@dataclass(frozen=True)
class Source:
    """A folder with results: a record, one below record/NAME/defense/, or purify's output."""

    folder: Path

    @property
    def above(self) -> Path | None:
        """The record whose set this one defends again, if it does."""
        return self.folder.parent.parent if self.folder.parent.name == "defense" else None

    def find(self, name: str) -> Path | None:
        """A file of it; the set as received and the truth may lie in the record above."""
        folders = [self.folder, *([self.above] if self.above and name in INHERITED else [])]
        return next((folder / name for folder in folders if (folder / name).exists()), None)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file's mapping, empty where there is none; raises UserError if it is damaged."""
        path = self.find(name)
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path else {}
        except ValueError:
            raise UserError(f"{path}: damaged, it is no JSON; run again what made it") from None
        return content if isinstance(content, dict) else {}

    def arrays(self, name: str) -> dict[str, np.ndarray] | None:
        """A .npz file's arrays, read without unpickling; None where there is none.

        Raises:
            UserError: it is damaged.
        """
        path = self.find(name)
        if path is None:
            return None
        try:
            with np.load(path, allow_pickle=False) as content:
                return {key: content[key] for key in content.files} or None
        except Exception as error:  # noqa: BLE001  zipfile and numpy raise their own
            reason = shortened(error)
            raise UserError(f"{path}: cannot be read ({reason}); run again what made it") from None

    def rows(self, name: str) -> list[dict[str, str]]:
        """A .csv file's rows, none where there is no such file."""
        path = self.find(name)
        if path is None:
            return []
        with open(path, newline="", encoding="utf-8") as source:
            return list(csv.DictReader(source))

    @property
    def victim_rows(self) -> list[dict[str, str]]:
        """Rows of metrics.csv of the victim's training, where that lies in the record above."""
        rows = Source(self.above).rows("metrics.csv") if self.above else []
        return [row for row in rows if row["stage"] == "victim"]

    @cached_property
    def report(self) -> dict[str, Any]:
        """The content of report.json, or of purify's summary.json.

        Raises:
            UserError: there is neither.
        """
        content = self.json("report.json") or self.json("summary.json")
        if not content:
            wanted = "give the folder of a finished run"
            raise UserError(f"{self.folder}: holds no report.json; {wanted}")
        return content

    @cached_property
    def decisions(self) -> dict[str, np.ndarray]:
        """Columns of decisions.csv: words, int64, or float64 with nan where a cell is empty.

        What a defence does not tell is filled in: labels that stay, no round, and for a verdict
        KEPT, FLAGGED or REMOVED.
        """
        rows, table = self.rows("decisions.csv"), {}
        for key in rows[0] if rows else ():
            cells = [row[key] for row in rows]
            table[key] = np.array(cells) if key in WORDS else _numbers(cells)
        return _completed(table) if "given_label" in table else table

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved keys, with the environment apart."""
        path = self.find("config.yaml")
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path else {}
        return {key: value for key, value in (content or {}).items() if key != "environment"}

    @cached_property
    def classes(self) -> dict[str, Any]:
        """names and, if kept, discrepancy, inflow, scores, evidence (per class) and thresholds."""
        kept = self.json("classes.json")
        if kept.get("names"):
            return kept
        columns = [self.decisions.get(key, np.zeros(0)) for key in ("given_label", "new_label")]
        most = max(column.max(initial=-1) for column in columns)
        return {"names": [str(k) for k in range(int(most) + 1)]}


def _completed(table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    given = table["given_label"]
    kept, flagged = (
        table.get("kept", np.ones_like(given)),
        table.get("flagged", np.zeros_like(given)),
    )
    verdict = np.where(kept == 0, "REMOVED", np.where(flagged == 1, "FLAGGED", "KEPT"))
    told = {"new_label": given, "round": np.full_like(given, -1), "kept": kept, "verdict": verdict}
    return told | table


def _numbers(cells: Sequence[str]) -> np.ndarray:
    """int64, float64 where cells are empty or have a point, or words where one is no number."""
    try:
        values = np.array([float(cell) if cell else np.nan for cell in cells])
    except ValueError:
        return np.array(cells)
    return values if any("." in cell or not cell for cell in cells) else values.astype(np.int64)


def dig(content: Any, path: Sequence[str]) -> Any:
    """The value at a path of keys, None where there is none."""
    for key in path:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def number(value: Any) -> str:
    """A share or rate with four digits, a count as it is, 'n/a' where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "n/a"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
