"""Command lines around the library: each parses its arguments, calls `sphere` and prints."""
