"""Which folders of a set are classes, and which are parts of it such as train and test.

It is read off the names and the places of the images:

1. Folders of two kinds of parts (train, val, test; whole words, beginnings or ends, in any case),
   whatever lies beside them, or folders that all have names of parts, are no classes.
2. A single folder of a part's name is a class like the others if it holds images itself, and the
   part to be given if its images lie in folders: a class may be called `train`.
3. Where several folders hold no images but folders of these, the classes may be either level: the
   user says which (`classes`). A folder of the same name in each (`n01/images/`) is passed through.
4. A single folder that holds folders is a step on the way to the set.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from utils.config import UserError
from utils.images.decoding import class_order

KINDS = {
    "train": r"(train|trn).*|.*train",
    "val": r"val(id|idation)?(set|data)?|dev|eval(uation)?",
    "test": r"(test|tst).*|.*test",
}
BESIDE = "annotations extra images imgs labels masks meta pred predictions unlabeled unlabelled"
SHOWN = 3
WITH_TEST = "name the two to be used train/ and test/, or give one of them"
Inner = dict[str, set[tuple[str, ...]]]  # first-level folder -> folders with images below it


def part_of(name: str) -> str | None:
    """Of which part of a set the name of a folder speaks: train, val, test, beside; or of none."""
    words = [name, *re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    for kind, pattern in KINDS.items():
        if any(re.fullmatch(pattern, word.casefold()) for word in words):
            return kind
    return "beside" if name.casefold() in BESIDE.split() else None


def refuse_doubt(folder: Path, folders: list[str], holders: set[str], said: str, key: str) -> None:
    """Raises UserError where what the user `said` of the classes leaves a doubt."""
    inner, told = _inner(folders, holders), None
    if said != "top":
        told = _told_parts(folder, inner, holders, key)
    if said == "auto" and not told:
        told = _told_levels(folder, inner, holders)
    if told:
        raise UserError(f"{key}: {told}")


def _inner(folders: Iterable[str], holders: Iterable[str]) -> Inner:
    """The folders with images below each first-level one; a step that all have is passed over."""
    inner: Inner = {path: set() for path in folders if "/" not in path}
    for path in holders:
        top, *below = path.split("/")
        inner.setdefault(top, set()).add(tuple(below))
    every = lambda: [below for paths in inner.values() for below in paths]
    while sum(map(bool, inner.values())) > 1 and () not in every():
        if len({below[0] for below in every()}) > 1:
            break
        inner = {top: {below[1:] for below in paths} for top, paths in inner.items()}
    return inner


def _nested(inner: Inner) -> list[str]:
    """The first-level folders that hold images only in folders."""
    return sorted(
        (top for top, paths in inner.items() if paths and () not in paths), key=class_order
    )


def _part(inner: Inner) -> str | None:
    """The part among first-level folders that is to be given instead; None where they are none."""
    parts = {name: part_of(name) for name in sorted(inner, key=class_order)}
    kinds = set(parts.values()) - {None, "beside"}
    told = [name for name in parts if parts[name] in kinds]
    alone = len(told) == 1 and told[0] in _nested(inner)
    if len(kinds) > 1 or (parts and all(parts.values())) or alone:
        train = (name for name in told if parts[name] == "train" and inner[name])
        return next(train, (told or list(parts))[0])
    return None


def _descend(holders: set[str], step: str | None = None) -> str:
    """The folder, of those with images in them, below which classes begin; `step` is the first."""
    inner = _inner((), holders)
    tops = list(inner)
    step = step or _part(inner) or (tops[0] if len(tops) == 1 and _nested(inner) else None)
    if step is None:
        return ""
    below = {path.removeprefix(f"{step}/") for path in holders if path.startswith(f"{step}/")}
    return "/".join(filter(None, (step, _descend(below))))


def _told_parts(folder: Path, inner: Inner, holders: set[str], key: str) -> str | None:
    """What is wrong where first-level folders are parts of a set."""
    if (part := _part(inner)) is None:
        return None
    shown = ", ".join(f"{name}/" for name in sorted(inner, key=class_order) if part_of(name))
    part_of_use = {"data": "give the part to be cleaned", "dataset_path": WITH_TEST}[key]
    advice = f"{part_of_use}, {folder / _descend(holders, part)}"
    return f"{folder} holds {shown}, which are no classes; {advice} (or --classes top, if they are)"


def _told_levels(folder: Path, inner: Inner, holders: set[str]) -> str | None:
    """What is wrong where the classes may be folders of the first level or further below."""
    tops, nested = [top for top, paths in inner.items() if paths], _nested(inner)
    if len(tops) == 1 and nested:
        give = folder / _descend(holders)
        return f"{folder} holds one folder of folders, {tops[0]}/, and no classes; give {give}"
    if len(nested) < 2:
        return None
    count = Counter(name for top in nested for name in {path[0] for path in inner[top]})
    shown = ", ".join(f"{top}/" for top in nested[:SHOWN]) + ", ..." * (len(nested) > SHOWN)
    repeated = sorted(name for name in count if count[name] > 1)
    if 2 * len(repeated) >= len(count):
        return (
            f"{folder} holds {shown} with folders of the same names ({repeated[0]}/), so these are "
            f"parts and no classes; give one, {folder / _descend(holders, nested[0])} (or say what "
            "the classes are: --classes top or --classes leaf)"
        )
    first = min(path for path in holders if path.startswith(f"{nested[0]}/"))
    return (
        f"{folder} holds folders of folders ({shown}); say what the classes are: "
        f"--classes leaf ({first}, ...) or --classes top ({nested[0]}, ...)"
    )
