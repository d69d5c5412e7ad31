"""The plumbing that every script shares: options, devices, checkpoints, tokens, records, batches, rollouts."""

import os

# Two OpenMP threads that spin while they wait starve each other as soon as another process is busy. torch reads this
# when it is first imported; a program that imports torch before this package only waits in torch's own way.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
