"""`attar view`: its options, and the page it opens."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from attar.command_output import show
from attar.options import AcceptLicence, Factory


def view_command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that attar compress wrote.")
    ],
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="0 takes any that is free.")
    ] = 8765,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Only say where the page is.")
    ] = False,
    factory: Factory = None,
    accept_licence: AcceptLicence = False,
) -> None:
    """Show a report in a browser, where other sizes and pins are solved at once, and made."""
    from attar.viewing import Viewer

    options = [f"--factory={factory}"] if factory else []
    options += ["--accept-licence"] if accept_licence else []
    viewer = Viewer(folder, port, options)
    try:
        show(f"report  {viewer.address}\nstop    Ctrl-C")
        sys.stdout.flush()
        if not no_browser and has_screen():
            webbrowser.open(viewer.address)
        viewer.serve_forever()
    except KeyboardInterrupt:  # the usual way to end it
        pass
    finally:
        viewer.server_close()


def has_screen() -> bool:
    """Say whether a browser with windows could open: one in the terminal would take it over."""
    return sys.platform != "linux" or any(
        name in os.environ for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
