"""The plumbing that every script shares: options, devices, checkpoints, tokens, records, batches, rollouts."""

import os
from pathlib import Path

# OpenMP's threads wait for each other at every small product. A short spin as they wait saves a third of the time, but
# it takes a core from whatever else runs: so only where nothing does. torch reads both when it is first imported
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
if Path('/proc/loadavg').exists() and ' 1/' in Path('/proc/loadavg').read_text(): # 1 of so many threads runs: this one
    os.environ.setdefault('GOMP_SPINCOUNT', '10000')
