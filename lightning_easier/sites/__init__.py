"""Find every call of an activation, and what lies around it."""
