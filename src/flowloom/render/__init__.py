"""Workflow to image: the in-process engine of the embedded world."""
