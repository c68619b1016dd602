"""What changes torch is loaded where it is asked for (`-p tests.devices.elsewhere`), and not to look for doctests."""

collect_ignore = ["elsewhere.py"]
