"""Files of weights: where they are, whether they are the right ones, what is in them.

Nothing here runs code that a file holds.
"""

import hashlib
import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffusion.card import CARDS

FOLDER_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
CHECKPOINTS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
READ_ERRORS = (
    *(OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError),
    *(ArithmeticError, EOFError, SafetensorError, pickle.UnpicklingError),
)


class DenoiserError(ValueError):
    """A denoiser cannot be used; one or two lines say which file, what is wrong and what to do."""


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
        words = f"sha256 is {found}, expected {expected};\nthe file is damaged: restore it"
        raise DenoiserError(f"{path}: {words}")
    return found


def first_line(error: BaseException) -> str:
    """The first line of an error's message, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def locate(name: str, places: list[Path]) -> Path:
    """The first of `places` that exists; else the hub's files, if `name` is like owner/name.

    Raises:
        DenoiserError: Nothing is there; the message lists every place tried.
    """
    if found := next((place for place in places if place.exists()), None):
        return found
    tried = " or ".join(map(str, dict.fromkeys(places)))
    is_path = name.startswith((".", "/", "~")) or name.endswith(CHECKPOINTS)
    if name.count("/") == 1 and not is_path:
        return _download(name, tried)
    known = ", ".join(CARDS)
    raise DenoiserError(f"denoiser '{name}': nothing at {tried}, nor a card; the cards are {known}")


def _download(hub_id: str, tried: str) -> Path:
    """Folder of the hub's files in its local cache, safetensors preferred; later works offline."""
    from huggingface_hub import snapshot_download

    try:
        for weights in FOLDER_WEIGHTS:
            wanted = [sub + file for sub in ("", "unet/") for file in ("config.json", weights)]
            folder = Path(snapshot_download(hub_id, allow_patterns=wanted))
            if any(folder.rglob(weights)):
                break
    except (OSError, ValueError) as error:
        words = f"nothing at {tried}, and no Hugging Face hub ({first_line(error)});\n"
        words += "connect to it once, or download the model's folder elsewhere and give its path"
        raise DenoiserError(f"denoiser '{hub_id}': {words}") from None
    return folder


def read_json(path: Path) -> dict:
    """The JSON object in a file; raises DenoiserError if it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
        raise DenoiserError(f"{path}: not readable as JSON ({reason}); save it again") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DenoiserError(f"{path}: expected a JSON object, found a {kind}; save it again")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a checkpoint file, on the CPU; DenoiserError if it is anything else."""
    if path.suffix not in CHECKPOINTS:
        known = " ".join(CHECKPOINTS)
        raise DenoiserError(f"{path}: not a checkpoint; give a diffusers folder or one of {known}")
    safe = path.suffix == ".safetensors"
    try:
        content = load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        words = "refused: it holds more than tensors, and reading the rest could run code;\n"
        words += "save the model's state_dict() alone, as .safetensors if you can"
        raise DenoiserError(f"{path}: {words}") from None
    except READ_ERRORS as error:
        reason = first_line(error)
        raise DenoiserError(f"{path}: not a checkpoint ({reason}); save it again") from None
    if isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values()):
        return content
    raise DenoiserError(f"{path}: no dictionary of tensors; save the model's state_dict() alone")
