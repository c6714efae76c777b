"""Set before torch is imported: what every test runs under."""

import os

# Threads that wait by spinning make tiny operations forty times slower on a machine that is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

pytest_plugins = ("browser_parts",)
