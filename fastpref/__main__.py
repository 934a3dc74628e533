"""`python -m fastpref` and `accelerate launch -m fastpref` are the `fastpref` command."""

import sys

from fastpref.trainer.cli import main

sys.exit(main())
