"""The plumbing that every script shares: options, devices, checkpoints, tokens, records, batches, rollouts."""

import os
from pathlib import Path

# OpenMP's threads wait for each other at every small product. A short spin as they wait saves a third of the time, but
# it takes a core from whatever else runs: so only where nothing does. torch reads both when it is first imported
OMP = {} if {'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'} & {*os.environ} else dict(OMP_WAIT_POLICY='PASSIVE') # or the user's
if OMP and Path('/proc/loadavg').exists() and ' 1/' in Path('/proc/loadavg').read_text(): # one thread runs: this one
    OMP['GOMP_SPINCOUNT'] = '10000'
os.environ.update(OMP)
