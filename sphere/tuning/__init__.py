"""Finding hyperparameters for a model: which layers by causal tracing, which numbers by a search on a tuning set."""
