"""Methods of other families, kept apart from the weight-update solvers of `sphere.methods`."""
