"""Local servers and child processes: MLflow, Prefect, Data Docs, and the environment they run in."""
