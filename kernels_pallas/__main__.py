"""`python -m kernels_pallas`: see `tuning.command_line`."""

from kernels_pallas.tuning.command_line import main

if __name__ == "__main__":
    raise SystemExit(main())
