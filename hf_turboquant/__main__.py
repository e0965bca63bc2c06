"""`python -m hf_turboquant` is `hf-turboquant`."""

import sys

from .cli import main

sys.exit(main())
