"""Running parts of a model on the positions that matter. Knows models and tensors; knows nothing of editing."""
