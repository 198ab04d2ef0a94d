"""Orchestration: Prefect flows over DVC's stage graph. Thin: what a stage does is in ``cm3leon``."""
