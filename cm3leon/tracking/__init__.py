"""MLflow runs and store, and the lineage of what a run made."""
