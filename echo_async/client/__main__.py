"""``python -m echo_async.client``"""

import sys

from ..cli.client import main

if __name__ == "__main__":
    sys.exit(main())
