"""Report the results of a training: analysis, figures, drawings, trackers."""
