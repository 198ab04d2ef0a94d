"""Bundles, the model registry in MLflow, and the gate between challenger and champion."""
