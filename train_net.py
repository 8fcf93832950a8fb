#!/usr/bin/env python
"""Train and evaluate a detector: ``python train_net.py --config-file FILE [options] [KEY VALUE ...]``.

The same as ``dyhead train``, which an installed package has.
"""

import sys

from dyhead.runs.command import main

if __name__ == "__main__":
    sys.exit(main())
