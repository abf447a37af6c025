# Weights lie in local files or on https://huggingface.co
"""Files of weights: where they are, whether they are the right ones, and what is in them. Nothing here runs code from a file."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor

FOLDER_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
CHECKPOINTS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
READ_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    RuntimeError,
    TypeError,
    AttributeError,
    ArithmeticError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)


class DenoiserError(ValueError):
    """A denoiser that the user named cannot be used; one or two lines say which file, what is wrong and what to do."""


def sha256_file(path: str | Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def checked_hash(path: Path, expected: str | None) -> str:
    """The file's sha256, which must be `expected` unless that is None."""
    found = sha256_file(path)
    if expected and found != expected:
        raise DenoiserError(
            f"{path}: sha256 is {found}, expected {expected};\nthe file is damaged or another one: restore it"
        )
    return found


def first_line(error: BaseException) -> str:
    """The first line of an error's message, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def locate(name: str, places: list[Path], cards: Iterable[str] = ()) -> Path:
    """The first of `places` that exists; otherwise the hub's files, if `name` can be a hub id (owner/name).

    Raises:
        DenoiserError: Nothing is there; the message lists every place tried.
    """
    for place in places:
        if place.exists():
            return place
    tried = " or ".join(map(str, dict.fromkeys(places)))
    if (
        name.count("/") == 1
        and not name.startswith((".", "/", "~"))
        and not name.endswith(CHECKPOINTS)
    ):
        return _download(name, tried)
    raise DenoiserError(
        f"denoiser '{name}': nothing at {tried}, and no such card; the cards are {', '.join(cards)}"
    )


def _download(hub_id: str, tried: str) -> Path:
    """Folder of the hub's files in its local cache, safetensors preferred; works offline once they are there."""
    from huggingface_hub import snapshot_download

    try:
        for weights in FOLDER_WEIGHTS:
            wanted = [sub + file for sub in ("", "unet/") for file in ("config.json", weights)]
            folder = Path(snapshot_download(hub_id, allow_patterns=wanted))
            if any(folder.rglob(weights)):
                break
    except (OSError, ValueError) as error:
        raise DenoiserError(
            f"denoiser '{hub_id}': nothing at {tried}, and the Hugging Face hub could not be used ({first_line(error)});\n"
            "connect to it once, or download the model's folder elsewhere and give its path"
        ) from None
    return folder


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        DenoiserError: The file holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DenoiserError(
            f"{path}: not readable as JSON ({first_line(error)}); save the denoiser again"
        ) from None
    if not isinstance(content, dict):
        raise DenoiserError(
            f"{path}: expected a JSON object, found a {type(content).__name__}; save the denoiser again"
        )
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a checkpoint file, on the CPU.

    Raises:
        DenoiserError: The file is damaged, or holds anything but a dictionary of tensors.
    """
    import torch
    from safetensors.torch import load_file

    if path.suffix not in CHECKPOINTS:
        raise DenoiserError(
            f"{path}: not a checkpoint; give a folder saved by diffusers or a file ending in {' '.join(CHECKPOINTS)}"
        )
    try:
        content = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError:
        raise DenoiserError(
            f"{path}: refused: it holds more than tensors, and reading the rest could run code;\n"
            "save the model's state_dict() alone, as .safetensors if you can"
        ) from None
    except READ_ERRORS as error:
        raise DenoiserError(
            f"{path}: not a checkpoint ({first_line(error)}); download or save it again"
        ) from None
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise DenoiserError(
            f"{path}: expected a dictionary of tensors, found something else; save the model's state_dict() alone"
        )
    return content
