"""Counter-based random numbers: the draws of an image depend on (seed, epoch, sample), not on batch or worker.

Counters are hashed by the finaliser of splitmix64 (Steele et al. 2014), which turns neighbouring numbers into
unrelated ones. A whole batch is drawn at once on its device; all devices give the same bits.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ALL = (1 << 64) - 1


def uniform(key: int | Tensor, samples: Tensor, draws: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 [B, draws], for sample numbers int64 [B], on their device.

    `key` is `seed_for(seed, epoch, stream)`, where `stream` separates draws for different purposes; as a tensor [] it
    may change without compiling anew.
    """
    return _numbers(_mix(samples * _signed(GOLDEN) + key), draws)


def draw_key(seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """The key for `uniform_by_key`, int64 []: a tensor, so that a compiled step is the same in every epoch."""
    return torch.full((), seed_for(seed, epoch), device=device)


def uniform_by_key(key: Tensor, samples: Tensor, draws: int, stream: int) -> Tensor:
    """Like `uniform`, with a key from `draw_key`: float32 [B, draws] in [0, 1), computed on the device alone."""
    image = _mix(samples * _signed(GOLDEN) + _mix(key + _signed((stream + 1) * _FIRST & _ALL)))
    return _numbers(image, draws)


def _numbers(image: Tensor, draws: int) -> Tensor:
    """The numbers of a stream, float32 [B, draws], from the hash of each image, int64 [B]."""
    # By way of `^`: PyTorch's compiler computes products of an `arange` as indices, which overflow.
    counters = (torch.arange(1, draws + 1, device=image.device) ^ 0) * _signed(GOLDEN)
    # A float32 below one represents 24 bits exactly.
    return _shift(_mix(image[:, None] + counters), 40).float() * 2.0**-24


def seed_for(*numbers: int) -> int:
    """A generator's seed in [0, 2**63), from any sequence of numbers."""
    text = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift(x, 27)) * _signed(_SECOND)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; PyTorch's shift of int64 extends the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The int64 with the bits of an unsigned number."""
    number &= _ALL
    return number - (1 << 64) if number >> 63 else number
