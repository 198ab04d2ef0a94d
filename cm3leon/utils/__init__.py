"""Utilities for every room: errors, progress, devices, image sheets, telemetry."""
