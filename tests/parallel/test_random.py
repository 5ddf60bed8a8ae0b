"""Dropout's keys depend on seed, step and sample, and on nothing else."""

import torch

from parallel.random import _mix, dropout_keys


def test_keys_are_those_of_the_reference_algorithm() -> None:
    # Published first output of SplitMix64 from state 0: https://prng.di.unimi.it/splitmix64.c
    assert _mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    samples_B = torch.tensor([0, 1, 2**40, 123456789])
    key = _mix(_mix(7) + 3 * 0x9E3779B97F4A7C15 & (2**64 - 1))
    expected = [_mix((sample * 0x9E3779B97F4A7C15 + key) & (2**64 - 1)) for sample in samples_B.tolist()]
    assert [k & (2**64 - 1) for k in dropout_keys(7, 3, samples_B).tolist()] == expected


def test_a_sample_has_its_key_wherever_it_is_computed() -> None:
    keys_B = dropout_keys(1, 2, torch.arange(8))
    parts = [dropout_keys(1, 2, samples_B) for samples_B in torch.arange(8).chunk(4)]
    assert torch.equal(keys_B, torch.cat(parts))


def test_keys_differ_between_seeds_steps_and_samples() -> None:
    keys = torch.cat([dropout_keys(seed, step, torch.arange(50)) for seed in (-1, 0, 1) for step in range(50)])
    assert len(keys.unique()) == 3 * 50 * 50
    ones = sum(((keys >> bit) & 1).double().mean() for bit in range(64)) / 64
    assert abs(ones - 0.5) < 0.01
