"""``python -m bloodcell_fastai``: the same as the ``bloodcell`` command."""

from .cli import main

main()
