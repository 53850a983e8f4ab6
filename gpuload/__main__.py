"""`python -m gpuload` is `gpuload`."""

from gpuload.cli import main

main()
