"""``python -m echo_async.server``"""

import sys

from ..cli.server import main

if __name__ == "__main__":
    sys.exit(main())
