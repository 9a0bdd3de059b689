"""`python -m launcher.attempt`: what the batch script of a run calls around each attempt."""

import sys

from launcher.attempt.lifecycle import main

sys.exit(main())
