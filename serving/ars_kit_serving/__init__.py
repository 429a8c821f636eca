"""Export and serving of trained members."""
