"""`wwwserve paper`; what it does is in a module that the processes it starts can import."""

import sys

from wwwserve.eval.paper.command import main

sys.exit(main())
