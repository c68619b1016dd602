"""Pure functions on operators: composition and least squares. No graph, no model."""
