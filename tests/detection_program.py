"""The detection example's script with the tests' backbone: ``torchrun detection_program.py --config-file …``."""

from __future__ import annotations

import os
import sys

from detection_shapes import EXAMPLE, register_tiny

sys.path.append(str(EXAMPLE))

import train_net


def main() -> None:
    register_tiny()
    status = train_net.main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as in ranks_program: gloo's threads may outlive the interpreter


if __name__ == "__main__":
    main()
