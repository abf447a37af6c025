"""Sets of image files and a table (.csv, .tsv) that says which label each has."""

import csv
import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from utils.config import UserError
from utils.images.decoding import IMAGE_ENDINGS, OUTSIDE, leads_out
from utils.images.encoded import FILE_COLUMNS, LABEL_COLUMNS, EncodedImages, column, files_beside
from utils.images.layout import Keys, Outcome, numbered
from utils.images.saving import free_name, saved_like
from utils.storage.files import shortened

TABLES = (".csv", ".tsv")
SEPARATORS = ",;\t"
NO_ROW = "in no row of the table"
FEW = 10  # rows, of which each may have a label of its own


def find_table(folder: Path, split: str) -> Path | None:
    """The table in a folder of images: the only one, or that of the split; None without any.

    Raises:
        UserError: there are several, and none or more than one named after the split.
    """
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in TABLES)
    named = [path for path in tables if split.casefold() in path.stem.casefold()]
    held = ", ".join(path.name for path in tables)
    if tables and not named and split != Keys.split:
        raise UserError(f"split: {folder} has no table for '{split}'; it has {held}")
    if len(tables) > 1 and len(named) != 1:
        raise UserError(f"data: {folder} holds {held}; give the one to be cleaned, {tables[0]}")
    return next(iter(named or tables), None)


class NoFiles(UserError):
    """None of the files that a table names is there."""


class FileTable(EncodedImages):
    """Image files, and a table beside or above them with a row for each.

    Raises:
        UserError: no such columns, files that are not there or outside, or labels that are none.
    """

    kind = "folder with a table"
    uses = ("split", "image_column", "label_column")

    def __init__(self, table: Path, keys: Keys):
        self.table, self.folder = table, table.parent
        self._read()
        self._find_columns(keys)
        cells = [row[self.file_column].strip() for row in self.rows]
        self.paths = self._files(cells, keys.split)
        given = [row[self.label_column].strip() for row in self.rows]
        if "" in given:
            named = self.paths[given.index("")]
            raise UserError(f"data: {table}: {named} has no label; give it one, or take it out")
        values, self.labels = numbered(np.array(given, dtype=str))
        self.classes = tuple(values.tolist())
        if len(values) > len(given) / 2 > FEW / 2:
            found = f"{len(values):,} labels for {len(given):,} files"
            raise UserError(f"label_column: {table} has {found}; name the column of the classes")
        self.look(self.folder)
        beside, own = files_beside(self.folder, [table]), set(self.paths)
        out = [name for name in beside if name not in own]
        self.reasons, self.found = {NO_ROW: out} if out else {}, len(beside)

    def _read(self) -> None:
        try:
            raw = self.table.read_bytes().decode("utf-8")
            self.mark, text = raw[:1] == "\ufeff", raw.removeprefix("\ufeff")
            self.line_end = "\r\n" if "\r\n" in text else "\n"
            self.separator = max(SEPARATORS, key=text.partition("\n")[0].count)
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=self.separator)
            self.rows = [row for row in reader if row]
        except (UnicodeDecodeError, csv.Error) as error:
            advice = "save it as UTF-8 with commas, semicolons or tabs"
            raise UserError(f"data: {self.table}: {shortened(error)}; {advice}") from None
        widths = [len(row) for row in self.rows]
        if not widths or min(widths) != max(widths) or max(widths) < 2:
            counts = f"{min(widths, default=0)} to {max(widths, default=0)}"
            wanted = "a file and a label in each, and as many columns in all"
            raise UserError(f"data: {self.table} has rows of {counts} columns; expected {wanted}")

    def _find_columns(self, keys: Keys) -> None:
        """Names are in the first row, unless that row is the first of exactly two columns' files."""
        first = [cell.strip() for cell in self.rows[0]]
        is_file = len(first) == 2 and first[0].lower().endswith(IMAGE_ENDINGS)
        self.head: list[list[str]] = [] if is_file else [self.rows.pop(0)]
        self.file_column, self.label_column = 0, 1
        if not is_file:
            find = lambda kind, given, known: column(kind, given, first, known, self.table)
            self.file_column = find("image", keys.image_column, FILE_COLUMNS)
            self.label_column = find("label", keys.label_column, LABEL_COLUMNS)

    def _files(self, cells: Sequence[str], split: str) -> list[str]:
        """The files that the cells name, relative to the folder.

        They are all in it, or all in one of the folders in it; the ending may be missing.
        """
        for cell in cells:
            path = PurePosixPath(cell.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or ":" in cell or not cell:
                told = f"names {cell!r}, which is no file below {self.folder}"
                raise UserError(f"data: {self.table} {told}; give relative names")
        images = (p for p in self.folder.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS)
        there = {path.relative_to(self.folder).as_posix() for path in images if path.is_file()}
        bases = ["", *sorted({f"{name.split('/')[0]}/" for name in there if "/" in name})]
        found = {base: [_named(base + _posix(cell), there) for cell in cells] for base in bases}
        whole = [base for base in bases if "" not in found[base]]
        fitting = [base for base in whole if base and split.casefold() in base.casefold()]
        if "" in whole or len(whole) == 1 or len(fitting) == 1:
            files = found["" if "" in whole else (fitting if len(fitting) == 1 else whole)[0]]
            self._refuse_odd(files)
            return files
        if whole:
            both = " and ".join(whole)
            told = f"the files that {self.table.name} names are in {both}"
            raise UserError(f"data: {self.folder}: {told}; give names with the folder")
        best = min(bases, key=lambda base: found[base].count(""))
        missing = [cell for cell, name in zip(cells, found[best]) if not name]
        told = f"{len(missing):,} of {len(cells):,} files that are not there, the first is"
        advice = f"expected it in {self.folder / best}"
        kind = NoFiles if len(missing) == len(cells) else UserError
        raise kind(f"data: {self.table} names {told} {missing[0]!r}; {advice}")

    def _refuse_odd(self, files: Sequence[str]) -> None:
        seen: set[str] = set()
        for name in files:
            if name in seen:
                raise UserError(f"data: {self.table} names {name} twice; leave one row of it")
            seen.add(name)
            if leads_out(self.folder / name, self.folder):
                advice = "put the file itself there, or remove its row"
                raise UserError(f"data: {self.folder / name} {OUTSIDE}; {advice}")

    def contents(self) -> Iterator[bytes]:
        return ((self.folder / path).read_bytes() for path in self.paths)

    def write(self, folder: Path, outcome: Outcome) -> dict[str, str]:
        """Files and table under their names, without what was dropped."""
        lost: dict[str, str] = {}
        rows = []
        kept = (~outcome.dropped).nonzero().flatten().tolist()
        taken = {self.paths[k].casefold() for k in kept}
        for k in kept:
            row, name = list(self.rows[k]), self.paths[k]
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if outcome.replaced[k]:
                original = (self.folder / name).read_bytes()
                saved = saved_like(original, outcome.images[k].numpy())
                if saved.ending and Path(name).suffix.lower() != saved.ending:
                    new = free_name(Path(name).with_suffix(saved.ending), taken)
                    row[self.file_column] = _renamed(row[self.file_column], name, new)
                    name = new
                (folder / name).write_bytes(saved.content)
                lost |= {self.paths[k]: saved.lost} if saved.lost else {}
            else:
                shutil.copyfile(self.folder / name, folder / name)
            if outcome.labels[k] != self.labels[k]:
                row[self.label_column] = self.classes[outcome.labels[k]]
            rows.append(row)
        self._write_table(folder / self.table.name, rows)
        return lost

    def _write_table(self, path: Path, rows: list[list[str]]) -> None:
        if rows == self.rows:
            shutil.copyfile(self.table, path)
            return
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=self.separator, lineterminator=self.line_end)
        writer.writerows(self.head + rows)
        path.write_bytes((("\ufeff" if self.mark else "") + text.getvalue()).encode())


def _posix(cell: str) -> str:
    return PurePosixPath(cell.replace("\\", "/")).as_posix()


def _named(name: str, there: set[str]) -> str:
    """The file of that name, whose ending may be missing; empty where there is none."""
    options = (name, *(name + ending for ending in IMAGE_ENDINGS))
    return next((option for option in options if option in there), "")


def _renamed(cell: str, old: str, new: str) -> str:
    """A cell that names `old`, with or without its ending, when the file is called `new`."""
    ending = Path(new).suffix if _posix(cell.strip()).endswith(Path(old).suffix) else ""
    head = cell.strip()[: len(cell.strip()) - len(PurePosixPath(_posix(cell.strip())).name)]
    return head + Path(new).stem + ending
