"""`uiface_cli.options` under its earlier name, for the training scripts."""

from uiface_cli.options import *  # noqa: F403
