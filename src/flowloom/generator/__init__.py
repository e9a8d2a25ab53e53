"""Tuning of image generators by reward (FDFO), and their way back into the catalogue."""
