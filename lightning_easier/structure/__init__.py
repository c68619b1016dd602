"""Change a model reversibly: stand-ins, fitted operators, paddings, and the marks that tell a checkpoint."""
