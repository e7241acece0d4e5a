"""A process that has torch imported and forks itself for each command line it reads: jobs that start at once.

In: a JSON list of words per line, for ``captioner.cli``. Out: the id of the process that runs them, then its
exit code, negative where a signal ended it.
"""

import json
import os
import signal
import sys

import captioner.engines.hf  # noqa: F401  (the slow imports)
from loops import cli
from tests import conftest  # noqa: F401  (threads and network, before torch)

# whoever started the tests may ignore these, and jobs would inherit that
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.setpgrp()
            sys.stdout = sys.stderr  # what jobs print is no answer
            code = 1
            try:
                code = cli.main(json.loads(line))
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
