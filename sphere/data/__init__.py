"""Facts to edit: records, the published formats, the starter set."""

from sphere.data.records import Record, load_records

__all__ = ["Record", "load_records"]
