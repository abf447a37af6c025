"""Random numbers keyed by what they are for: (seed, stage, index), never global state."""

import contextlib
import zlib
from collections.abc import Callable, Iterator

import torch


def key_seed(*key: int | str) -> int:
    """A 63-bit seed from numbers and words, by splitmix64.

    torch's CPU generator takes the lower 32 bits: of 200,000 streams some five pairs are the same.
    """
    words = [zlib.crc32(k.encode()) if isinstance(k, str) else int(k) for k in key]
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for the stream that `key` names."""
    return torch.Generator(device=device).manual_seed(key_seed(*key))


@contextlib.contextmanager
def global_stream(
    *key: int | str, device: torch.device | str = "cpu", process: int = 0
) -> Iterator[None]:
    """Within it, what a network draws from torch's global stream (weights, dropout) is keyed.

    Args:
        key: names the stream.
        device: where the network is; its stream and the CPU's are put back afterwards.
        process: rank, where several processes are to draw differently.
    """
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(key_seed(*key) + process)
        yield


def per_sample(
    draw: Callable[[torch.Generator], torch.Tensor], index: torch.Tensor, *key: int | str
) -> torch.Tensor:
    """(B, ...): what `draw` takes from each sample's stream, of `key` and its index."""
    return torch.stack([draw(keyed_generator(*key, int(i))) for i in index])
