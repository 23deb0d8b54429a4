"""The command ``cocktail-cli``. One file a command; each imports what is heavy when it runs, never before."""
