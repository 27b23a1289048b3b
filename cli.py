"""Run the `bloodcell` commands from a checkout: python cli.py fit --epochs 20."""

from bloodcell_fastai.cli import main

if __name__ == "__main__":
    main()
