"""``ddpm-fast``. Outside of the package, whose import takes seconds in which Ctrl-C is to be as quiet as later."""

import sys


def main() -> None:
    try:
        from ddpm_fast.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
