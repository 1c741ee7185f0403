"""The parts of a training run, from its inputs to its summary; `dist_qft.train` is the verb that drives them."""
