"""What a solve is made of: target values z (`compute_z`), keys (`compute_ks`), second moments (`layer_stats`)."""
