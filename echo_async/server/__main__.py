"""``python -m echo_async.server``"""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
