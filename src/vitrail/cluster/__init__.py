"""Many runs, and many machines: grids of runs, Slurm and Ray. Thin: `train` and `predict` do the work."""
