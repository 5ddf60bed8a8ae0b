"""What a model says of itself, as data, so that it can be shared among ranks: it declares a `Plan` as `model.plan`."""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Plan:
    """Which modules are shared among tensor-parallel ranks, and how (Shoeybi et al. 2019, arXiv:1909.08053, section 3;
    sequence parallelism: Korthikanti et al. 2022, arXiv:2205.05198), by patterns of their names.

    Between regions each rank holds a part of the sequence. All parameters that are in none of column, row, vocabulary
    and experts are held whole, and their gradients are added up.

    Args:
        regions: modules that are entered with the whole sequence and left with partial sums, which are added up.
        column: linear layers whose output features are shared.
        grouped: those of `column` whose output features belong to `groups` heads, of which there may be fewer than
            ranks: ranks then hold all and each computes its own head.
        groups: see there.
        row: linear layers whose input features are shared.
        vocabulary: embeddings, and a head, whose rows are shared.
        gathered: modules whose output is needed for the whole sequence.
        experts: modules of stacked matrices, one per expert, whose names are among those of `column` and `row`: experts
            are shared among expert-parallel ranks, their features among tensor-parallel ones. `forward(rows, counts)`
            takes and returns rows sorted by expert.
        routers: modules that attach losses to sequences: with `share`, the part of them that this rank attaches, and
            `over_sequence`, which completes counts of whole sequences.
    """

    regions: tuple[str, ...] = ()
    column: tuple[str, ...] = ()
    grouped: tuple[str, ...] = ()
    groups: int = 1
    row: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()


def chosen(model: nn.Module, patterns: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose names match one of the patterns, with their names."""
    for name, module in model.named_modules():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            yield name, module
