"""`python -m fusion.launch`: see `fusion.launch.launcher`."""

import signal
import sys

from fusion import signals
from fusion.launch.launcher import main

if __name__ == "__main__":
    code = main()
    # A stop signal that arrives while the interpreter shuts down would replace the exit code.
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
