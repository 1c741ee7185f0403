"""Frozen weights: the packed formats (nf4, affine4, q8_0, dense) and the modules that compute with them."""
