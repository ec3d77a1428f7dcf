"""python -m rlkl"""

import sys

from rlkl.cli import main

sys.exit(main())
