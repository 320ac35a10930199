import sys
from pathlib import Path

# Rooms share what lies beside them, and pytest's importlib mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parents[1]))
