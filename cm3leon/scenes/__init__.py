"""The synthetic world: scenes with exact ground truth, and the reading of scenes back from pixels."""
