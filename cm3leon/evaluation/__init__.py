"""Metrics, each in a file of its own, what is measured of each task, and the record that holds the scores."""
