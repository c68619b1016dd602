"""Replace chains around activations by operators fitted to what they compute: find, sum up, fit, price."""
