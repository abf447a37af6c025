"""Sets of Hugging Face: folders of parquet files, and what `Dataset.save_to_disk` writes.

A column holds encoded images, {bytes, path} each, and one labels, whose names stand in the schema.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from utils.config import UserError
from utils.images.decoding import OUTSIDE, leads_out
from utils.images.encoded import (
    LABEL_COLUMNS,
    PICTURE_COLUMNS,
    STRAY,
    EncodedImages,
    column,
    copy_files,
    files_beside,
    parted,
)
from utils.images.layout import Keys, Outcome, numbered
from utils.images.saving import saved_like
from utils.storage.files import shortened

AT_ONCE = 64  # images that memory holds
OF_OLD_DATA = "cache-*.arrow"  # what `datasets` computed from a set
PARTS_OF_ONE = re.compile(r"(.+?)-\d+-of-\d+")
STATE, INFO, PARTS = "state.json", "dataset_info.json", "dataset_dict.json"


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        told = f"{path} is read with pyarrow, which is not installed; pip install pyarrow"
        raise UserError(f"data: {told}") from None
    return pyarrow


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Any]:
    """The module pyarrow; what it raises in the block becomes a UserError that names `path`."""
    pa = _pyarrow(path)
    try:
        yield pa
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data: {path} cannot be read ({shortened(error)})") from None


def arrow_files(path: Path, split: str) -> list[Path]:
    """The files of a part of a set at `path`; none where it is no such set.

    Raises:
        UserError: it is one, but has no such part, or several that are called so.
    """
    if path.is_file():
        return [path] if path.suffix in (".parquet", ".arrow") else []
    if not path.is_dir():
        return []
    saved = (path / PARTS).is_file() or (path / STATE).is_file()
    found = path.glob("**/*.arrow" if saved else "**/*.parquet")
    hidden = lambda file: any(part.startswith(".") for part in file.relative_to(path).parts)
    files = sorted(p for p in found if not p.match(OF_OLD_DATA) and p.is_file() and not hidden(p))
    parts = {_part(file, path, saved) for file in files}
    chosen = [p for p in files if _part(p, path, saved) == split]
    if not chosen and len(parts) == 1 and split == Keys.split:
        return files
    if files and not chosen:
        raise UserError(f"split: {path} has no part '{split}'; it has {', '.join(sorted(parts))}")
    if len({file.parent for file in chosen}) > 1:  # configurations of one data set
        raise UserError(f"data: {path} holds several sets; give the one to be cleaned")
    return chosen


def _part(file: Path, folder: Path, saved: bool) -> str:
    """The part that a file belongs to: train of train-00000-of-00002 or of train/0000."""
    numbered_name = PARTS_OF_ONE.fullmatch(file.stem)
    if saved or file.stem.isdecimal():
        return "" if file.parent == folder else file.parent.name
    return numbered_name[1] if numbered_name else file.stem


class ArrowFiles(EncodedImages):
    """Images and labels in the columns of parquet or arrow files.

    Raises:
        UserError: no such columns, rows without an image or a label, or pyarrow is not there.
    """

    uses = ("split", "image_column", "label_column")

    def __init__(self, path: Path, files: Sequence[Path], keys: Keys):
        self.root, self.files = (path.parent if path.is_file() else path), list(files)
        self.kind = f"{self.files[0].suffix.removeprefix('.')} dataset"
        self.alone = path.is_file()
        for file in self.files:
            if leads_out(file, self.root):
                raise UserError(f"data: {file} {OUTSIDE}; put the file itself there")
        with reading(self.files[0]) as pa:
            schemas = [self._schema(pa, file) for file in self.files]
            if any(not schema.equals(schemas[0]) for schema in schemas):
                raise UserError(f"data: {path}: its files have different columns; give one set")
            self._find_columns(pa, schemas[0], keys)
            parts = [self._labels(file) for file in self.files]
            self.counts, given = list(map(len, parts)), np.concatenate([p for p in parts if len(p)])
            counted = zip(self.files, self.counts)
            self.paths = [f"{file.name}#{k}" for file, count in counted for k in range(count)]
            self._number(given, _class_names(schemas[0], self.root, self.label))
        self.look(path)
        beside = [] if self.alone else files_beside(self.root, self.files)
        self.others, out = parted(self.root, beside, OF_OLD_DATA)
        self.reasons = {STRAY: out} if out else {}

    def _schema(self, pa: Any, file: Path) -> Any:
        if file.suffix == ".parquet":
            return pa.parquet.read_schema(file)
        with _opened(pa, file) as batches:
            return batches.schema

    def _find_columns(self, pa: Any, schema: Any, keys: Keys) -> None:
        find = lambda kind, given, known: schema.names[
            column(kind, given, schema.names, known, self.files[0])
        ]
        self.image = find("image", keys.image_column, PICTURE_COLUMNS)
        self.label = find("label", keys.label_column, LABEL_COLUMNS)
        image, label = schema.field(self.image).type, schema.field(self.label).type
        if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
            told = f"'{self.image}' of {self.files[0]} is {shortened(ValueError(image))}"
            raise UserError(f"image_column: {told}; expected encoded images, bytes and path each")
        if not (pa.types.is_integer(label) or pa.types.is_string(label)):
            told = f"'{self.label}' of {self.files[0]} is {label}"
            raise UserError(f"label_column: {told}; expected integers or text")

    def _labels(self, file: Path) -> np.ndarray:
        parts = [table[self.label] for table in self._tables(file, [self.label])]
        values = [value for part in parts for value in part.to_pylist()]
        if None in values:
            told = f"row {values.index(None)} of {file} has no label"
            raise UserError(f"data: {told}; give it one, or take it out")
        self.paths = [
            *getattr(self, "paths", []),
            *(f"{file.name}#{k}" for k in range(len(values))),
        ]
        return np.array(values)

    def _number(self, given: np.ndarray, names: list[str]) -> None:
        if not names or given.dtype.kind not in "iu":
            self.values, self.labels = numbered(given)
            self.classes = tuple(map(str, self.values))
            return
        self.values, self.classes = np.arange(len(names)), tuple(names)
        if given.min(initial=0) < 0 or given.max(initial=0) >= len(names):
            span = f"labels {given.min()}..{given.max()} and {len(names)} names of classes"
            raise UserError(f"data: {self.files[0]} has {span}; take rows without a label out")
        self.labels = torch.from_numpy(given.astype(np.int64))

    def _tables(self, file: Path, columns: list[str] | None = None) -> Iterator[Any]:
        """A file's tables: row groups or batches whole, or AT_ONCE rows at a time of `columns`."""
        with reading(file) as pa:
            if file.suffix == ".parquet":
                with pa.parquet.ParquetFile(file) as content:
                    if columns is None:
                        groups = range(content.num_row_groups)
                        yield from (content.read_row_group(k) for k in groups)
                    else:
                        batches = content.iter_batches(AT_ONCE, columns=columns)
                        yield from (pa.Table.from_batches([batch]) for batch in batches)
                return
            with _opened(pa, file) as batches:
                for batch in batches:
                    table = pa.Table.from_batches([batch])
                    yield table.select(columns) if columns else table

    def contents(self) -> Iterator[bytes]:
        for file in self.files:
            for table in self._tables(file, [self.image]):
                for start in range(0, len(table), AT_ONCE):
                    for cell in table[self.image].slice(start, AT_ONCE).to_pylist():
                        yield self._bytes(cell, file)

    def _bytes(self, cell: Any, file: Path) -> bytes:
        if not cell or cell["bytes"] is None:
            told = "has rows without the bytes of an image, perhaps with the path of a file"
            raise UserError(f"data: {file} {told}; save the set with its images embedded")
        return cell["bytes"]

    def write(self, folder: Path, outcome: Outcome) -> dict[str, str]:
        """The same files, of which those with changes are written anew; all others are copied."""
        lost: dict[str, str] = {}
        changed = outcome.replaced | outcome.dropped | (outcome.labels != self.labels)
        start = 0
        for file, count in zip(self.files, self.counts):
            target = folder / file.relative_to(self.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            if changed[start : start + count].any():
                self._rewrite(file, target, start, outcome, lost)
            else:
                shutil.copyfile(file, target)
            start += count
        copy_files(self.root, folder, self.others)
        state = folder / self.files[0].relative_to(self.root).parent / STATE
        if changed.any() and state.is_file() and not self.alone:
            _renew_fingerprint(state, outcome)
        return lost

    def _rewrite(
        self, file: Path, target: Path, start: int, outcome: Outcome, lost: dict[str, str]
    ) -> None:
        pa = _pyarrow(file)
        with _writer(pa, file, target, self._schema(pa, file)) as write:
            for table in self._tables(file):
                rows = slice(start, start + len(table))
                write(self._changed(pa, table, rows, outcome, lost))
                start = rows.stop

    def _changed(
        self, pa: Any, table: Any, rows: slice, outcome: Outcome, lost: dict[str, str]
    ) -> Any:
        """A table of the samples `rows` with the outcome carried out."""
        replaced = (outcome.replaced & ~outcome.dropped)[rows].nonzero().flatten().tolist()
        if replaced:
            cells = table[self.image].to_pylist()
            for k in replaced:
                saved = saved_like(cells[k]["bytes"], outcome.images[rows.start + k].numpy())
                cells[k] |= {"bytes": saved.content}
                if saved.ending and cells[k].get("path"):
                    name = PurePosixPath(cells[k]["path"]).with_suffix(saved.ending)
                    cells[k]["path"] = name.as_posix()
                lost |= {self.paths[rows.start + k]: saved.lost} if saved.lost else {}
            table = _with_column(pa, table, self.image, cells)
        relabelled = (outcome.labels != self.labels)[rows].nonzero().flatten().tolist()
        if relabelled:
            labels = table[self.label].to_pylist()
            for k in relabelled:
                labels[k] = self.values[outcome.labels[rows.start + k]].item()
            table = _with_column(pa, table, self.label, labels)
        return table.filter(pa.array((~outcome.dropped)[rows].tolist(), pa.bool_()))


@contextlib.contextmanager
def _opened(pa: Any, file: Path) -> Iterator[Any]:
    """Schema and batches of an arrow file of the streaming format, in which `datasets` writes."""
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
        yield stream


@contextlib.contextmanager
def _writer(pa: Any, file: Path, target: Path, schema: Any) -> Iterator[Any]:
    """A function that writes tables as row groups or batches, packed as in `file`."""
    if file.suffix == ".parquet":
        groups = pa.parquet.read_metadata(file)
        packing = groups.row_group(0).column(0).compression.lower()
        packing = "none" if packing == "uncompressed" else packing
        with pa.parquet.ParquetWriter(target, schema, compression=packing) as writer:
            yield lambda table: writer.write_table(table, row_group_size=max(1, len(table)))
    else:
        with pa.ipc.new_stream(str(target), schema) as writer:
            yield lambda table: writer.write_table(table)


def _with_column(pa: Any, table: Any, name: str, values: list[Any]) -> Any:
    place = table.schema.get_field_index(name)
    field = table.schema.field(place)
    return table.set_column(place, field, pa.array(values, field.type))


def _class_names(schema: Any, folder: Path, label: str) -> list[str]:
    """What the schema, or the description beside the files, calls the classes; empty if nothing."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OSError):
        told = (schema.metadata or {}).get(b"huggingface")
        features = json.loads(told)["info"]["features"] if told else None
        if features is None:
            features = json.loads((folder / INFO).read_text("utf-8"))["features"]
        return [str(name) for name in features[label]["names"]]
    return []


def _renew_fingerprint(state: Path, outcome: Outcome) -> None:
    """By it `datasets` finds what it computed before, which was from other data."""
    with contextlib.suppress(ValueError, TypeError):
        content = json.loads(state.read_text("utf-8"))
        digest = hashlib.sha256(str(content.get("_fingerprint")).encode())
        for column_ in (outcome.labels, outcome.replaced, outcome.dropped):
            digest.update(column_.numpy().tobytes())
        content["_fingerprint"] = digest.hexdigest()[:16]
        state.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
