import sys

from launcher.attempt.lifecycle import main

sys.exit(main())
