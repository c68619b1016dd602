"""Merge what is linear in a row into equal operators: capture, read, plan, write, verify."""
