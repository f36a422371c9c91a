"""`python -m fusion.launch`: see `fusion.launch.launcher`."""

import signal
import sys

from fusion import signals
from fusion.launch.launcher import main

if __name__ == "__main__":
    code = main()
    for number in signals.SIGNALS:  # one that comes while Python winds up would end this process in place of its code
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
