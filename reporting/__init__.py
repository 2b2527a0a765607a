"""What a training has come to: analysis, figures, drawings, TensorBoard."""
