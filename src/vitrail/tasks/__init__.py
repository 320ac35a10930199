"""One job a file, all of the shape that `task.py` sets."""
