"""Dropout whose mask is a function of (key, layer, position, feature), not of a generator's state.

Whichever rank computes a sample, and whenever, drops the same features; recomputation and resumption need no
generator to be saved. The function is a counter-based hash as in Salmon et al. 2011 ("Parallel random numbers: as easy
as 1, 2, 3"), built from the finalisers of SplitMix64 and MurmurHash3.

Shape suffixes: B sequences, L tokens, N features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _mixed64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64; right shifts keep the sign, so its copies are masked away."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & (2**33 - 1))


def _mixed32(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser on int32."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2048144789  # 0x85EBCA6B
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -1028477387  # 0xC2B2AE35
    return x ^ ((x >> 16) & 0xFFFF)


def keys_of_layers(keys_B: Tensor | None, layers: int) -> Sequence[Tensor | None]:
    """An independent int64 key_B for each layer; None for each where there are no keys."""
    return [None] * layers if keys_B is None else [_mixed64(_mixed64(keys_B) + layer) for layer in range(layers)]


def random_bits(keys_B: Tensor, site: int, shape: tuple[int, ...], index_L: Tensor | None = None) -> Tensor:
    """bits_B...: uniform int32 for every element; equal for equal (key, site, index).

    Args:
        keys_B: int64 key of each sequence; all 64 bits count.
        site: which dropout of the layer this is.
        shape: the shape of one sequence's values.
        index_L: where each of the values along the first dimension is in the whole sequence; None: they are all of it.
    """
    keys_B = _mixed64(keys_B ^ site)
    per_sequence = (-1, *[1] * len(shape))
    low_B = keys_B.to(torch.int32).view(per_sequence)  # wraps to the low half
    high_B = (keys_B >> 32).to(torch.int32).view(per_sequence)
    if index_L is None:
        index_L = torch.arange(shape[0], device=keys_B.device)
    features = torch.Size(shape[1:]).numel()
    index_LN = index_L.to(torch.int32)[:, None] * features
    index_LN = index_LN + torch.arange(features, dtype=torch.int32, device=keys_B.device)
    index = index_LN.view(1, *shape)
    # Two rounds with a key each: with one, two sequences would read the same stream from different starts.
    return _mixed32(_mixed32(index ^ low_B) ^ high_B)


def dropout(
    x_BLN: Tensor, probability: float, keys_B: Tensor | None, site: int, index_L: Tensor | None = None
) -> Tensor:
    """Set features to 0 with `probability` and scale the others so that the mean stays; without keys, nothing.

    Args:
        x_BLN: a sequence, or some of its tokens, which drop what they would drop as part of it.
        probability: in [0, 1).
        keys_B, site, index_L: as in `random_bits`.
    """
    if keys_B is None or probability == 0.0:
        return x_BLN
    threshold = round(probability * 2**32) - 2**31
    kept_BLN = random_bits(keys_B, site, tuple(x_BLN.shape[1:]), index_L) >= threshold
    return x_BLN * kept_BLN * (1.0 / (1.0 - probability))
