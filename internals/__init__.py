"""What the recipe calls and a first reading skips."""
