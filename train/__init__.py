"""What runs in a training process. Imports torch; the launcher does not import this."""

import os

# torch reads this while it is imported, and this file comes before any of ours that imports it. In blocks of fixed size 6.6 of 79 GiB lay in
# holes of the wrong size when a second GPU's buckets came, and a job that fits did not start (benchmarks/results/2026-11-28-speed.md). The older name of the
# variable: torch 2.9 takes expandable segments from that one only (pytorch#183387), later ones from both.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
