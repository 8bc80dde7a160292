"""`python -m hata`: the command `hata`."""

from hata.cli import main

main()
