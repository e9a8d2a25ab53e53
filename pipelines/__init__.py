"""Pipelines: components wired, with resources. `python -m pipelines --help`."""
