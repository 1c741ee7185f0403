"""Results of a merge: one file per kind, and what they share (`folder`, `safetensors_folder`, `model_files`)."""
