"""Runs as jobs of Slurm: by `python -m launchers.slurm`, `launcher=slurm` of a lifecycle, `hydra/launcher=slurm`."""
