"""Export targets: `gguf`, `quantized`, `dense` and `peft` are one file each; the other files are shared by them."""
