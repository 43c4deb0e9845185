"""What the tests of the search share with those of single methods."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
