"""How far the slow sweeps go: ``NORMZOO_SWEEPS=full make test-slow`` takes each to its end."""

import os

FULL = os.environ.get("NORMZOO_SWEEPS") == "full"
EXAMPLES = 5000 if FULL else 1000
