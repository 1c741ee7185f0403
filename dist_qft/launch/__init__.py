"""`python -m dist_qft.launch`: torchrun with the exit code of the rank that failed first. Runs outside the ranks."""
