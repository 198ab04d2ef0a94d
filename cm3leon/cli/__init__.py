"""The command ``cm3leon``: stages, the project, the registry, and the use of a model."""
