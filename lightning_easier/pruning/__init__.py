"""Which activation goes next, and whether it was worth it. No Trainer."""
