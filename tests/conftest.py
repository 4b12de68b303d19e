"""Settings shared by all tests."""

import os

# The suite runs beside others on small machines; one thread per process is the quickest there.
os.environ.setdefault("OMP_NUM_THREADS", "1")
