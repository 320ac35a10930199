import sys
from pathlib import Path

# The tests of this room share `images.py`, and pytest's importlib mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parent))
