"""Scores of an edited model: teacher-forced and generated."""
