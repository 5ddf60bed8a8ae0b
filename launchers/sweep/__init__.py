"""Sweeps: one command tried with many settings, by grid, at random or by Optuna's proposals; the best one kept."""
