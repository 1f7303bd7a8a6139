"""``python -m dnt_scale.cli``: the ``dnt`` command, where the script of that name is not
installed.
"""

import sys

from dnt_scale.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
