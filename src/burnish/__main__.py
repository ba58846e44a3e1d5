"""`python -m burnish`, and `accelerate launch -m burnish`."""

from burnish.cli import main

main()
