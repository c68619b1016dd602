"""The linear steps that are known: a rule for each kind of call."""
