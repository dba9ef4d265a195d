"""Command lines that edit models."""
