"""Pictures: curves of a run, grids and panels of images."""
