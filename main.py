"""The command `vitpyramid`, in a copy of the repository: python main.py --config=configs/quickstart.py."""

from vitpyramid.cli import command

if __name__ == "__main__":
    command()
