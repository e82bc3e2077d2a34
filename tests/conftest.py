"""Puts the repository's root on the path, so that the tests run from anywhere and need no installation."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
