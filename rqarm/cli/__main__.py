"""``python -m rqarm.cli``: the same as ``rqarm``."""

from rqarm.cli import main

main()
