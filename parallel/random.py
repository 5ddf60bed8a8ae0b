"""Random numbers that depend on what is computed, never on the rank that computes it.

Shape suffixes: B sequences.
"""

from torch import Tensor

_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators")."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def dropout_keys(seed: int, step: int, samples_B: Tensor) -> Tensor:
    """keys_B: one int64 key per sequence, from (seed, step, sample).

    Args:
        seed: of the run.
        step: optimizer step.
        samples_B: position of each sample in the run, int64.
    """
    key = _mix((_mix(seed & _MASK) + step * 0x9E3779B97F4A7C15) & _MASK)
    mixed_B = samples_B * _signed(0x9E3779B97F4A7C15) + _signed(key)  # int64 wraps around, as the algorithm has it
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed_B = (mixed_B ^ _shifted(mixed_B, shift)) * _signed(factor)
    return mixed_B ^ _shifted(mixed_B, 31)


def _shifted(values_B: Tensor, bits: int) -> Tensor:
    """Logical shift right: torch's keeps the sign."""
    return (values_B >> bits) & ((1 << (64 - bits)) - 1)
