"""The stages of the pipeline, one file each; ``dvc.yaml`` has their order."""
