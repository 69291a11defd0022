"""Makes `pytest` find sid_fm.py and toy_2d.py, which stand beside this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
