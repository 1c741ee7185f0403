"""The helpers that tests share: small models, pools of ranks, real commands as processes, a Slurm of one machine."""
