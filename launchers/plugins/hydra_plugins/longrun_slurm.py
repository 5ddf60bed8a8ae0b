"""Hydra looks for launchers in this package only. What `hydra/launcher=slurm` does is in launchers/slurm/array.py."""

from launchers.slurm.array import SlurmArray


class SlurmLauncher(SlurmArray):
    pass
