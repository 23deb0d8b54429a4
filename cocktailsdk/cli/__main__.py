"""``python -m cocktailsdk.cli``, and ``torchrun -m cocktailsdk.cli``: the command line."""

from .main import main

main()
