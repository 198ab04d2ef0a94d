"""The synthetic world: scenes of shapes that are painted with exact ground truth, and read back from pixels to score images."""
