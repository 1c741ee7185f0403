"""QST, quantized side tuning (arXiv 2401.07159): a narrow network that trains beside the frozen base.

`sizes` shrinks a decoder's configuration, `downsample` brings the base's hidden states to the narrow width,
`network` is the side network and its hooks, `plan` decides it from shapes alone, `pruning` starts it from the base's
own weights. `hidden_cache` keeps the base's hidden states on disk.
"""
