"""Measure activations on real data: entropies, and the affines that come closest."""
