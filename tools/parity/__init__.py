"""`python -m tools.parity`: every layout trains the same run.

Each cell trains a small decoder for some steps on uneven label masks and several documents per sequence, from one
initialisation, and is held against one process that does the same in one micro-batch: largest difference of the loss
over the steps, of the gradient norm, and of the final weights.
"""

from tools.parity.cells import BF16, FP32, QUICK, Cell, Gate, cells
from tools.parity.run import Row, compare, difference
from tools.parity.training import (
    ADAMW,
    MODEL,
    MUON,
    SEQUENCES,
    VOCABULARY,
    Training,
    Trajectory,
    batch_of,
    build,
    shares,
    train,
)

__all__ = [
    "ADAMW",
    "BF16",
    "FP32",
    "MODEL",
    "MUON",
    "QUICK",
    "SEQUENCES",
    "VOCABULARY",
    "Cell",
    "Gate",
    "Row",
    "Training",
    "Trajectory",
    "batch_of",
    "build",
    "cells",
    "compare",
    "difference",
    "shares",
    "train",
]
