"""What every wing may use: checks of arguments, running a model, costs and times, files."""
