"""`python -m wwwserve.eval.live`: see `wwwserve.eval.live.trial`."""

import sys

from wwwserve.eval.live.trial import main

if __name__ == "__main__":
    sys.exit(main())
