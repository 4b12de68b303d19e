"""`python -m mezzotint`: the command line, also under torchrun. Knows nothing but where it is."""

import sys

from mezzotint.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
