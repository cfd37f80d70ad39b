"""`python -m uiface_diffusers.cli ...` is `uiface ...`: `accelerate launch -m` wants the name of a module."""

from uiface_cli import build_parser, main

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    main()
