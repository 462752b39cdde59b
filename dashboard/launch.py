"""Starts the pages: Streamlit as this very process, bound to this machine unless readers must sign in."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from common.errors import UserError
from common.home import HOME_VARIABLE
from common.store.engine import URL_VARIABLE, parse_url
from dashboard import LOGIN_VARIABLE
from dashboard.login_file import login_files

APP = Path(__file__).with_name("serving.py")
ROOT = Path(__file__).parents[1]


def serve(home: Path, database_url: str | None, port: int, address: str, browser: bool) -> NoReturn:
    """Become the dashboard's server.

    Parameters
    ----------
    home : Path
        Folder of the runs.
    database_url : str, optional
        Of the database; handed on in the environment, where other users of the machine cannot read it.
    port : int
        To listen on; 0 takes a free one.
    address : str
        To listen at.
    browser : bool
        Open the reader's browser.

    Raises
    ------
    UserError
        If Streamlit is not installed, the database's address cannot be read, the port is taken, or others could look
        without signing in.
    """
    if find_spec("streamlit") is None:
        raise UserError("the dashboard is not installed; pip install 'lorafleet[dashboard]'")
    parse_url(home, database_url)
    login = check_login(address)
    port = free_port(address, port)
    environment = os.environ | {HOME_VARIABLE: str(home.absolute()), "PYTHONPATH": python_path()}
    environment[LOGIN_VARIABLE] = "1" if login else ""
    if database_url:
        environment[URL_VARIABLE] = database_url
    host = f"[{address}]" if ":" in address else address
    print(f"dashboard of {announced(home, database_url)}: http://{host}:{port} (end with Ctrl-C)", flush=True)
    os.execve(sys.executable, command(address, port, browser), environment)


def announced(home: Path, database_url: str | None) -> str:
    """Name what is shown, without the database's address, which may hold a password."""
    if database_url:
        return "the database given"
    return f"the database of {URL_VARIABLE}" if os.environ.get(URL_VARIABLE) else str(home)


def command(address: str, port: int, browser: bool) -> list[str]:
    """Return the command that runs Streamlit."""
    given = {
        "server.address": address,
        "server.port": str(port),
        "server.headless": "false" if browser else "true",
        "logger.hideWelcomeMessage": "true",
        "logger.level": "error",
    }
    options = [f"--{key}={value}" for key, value in given.items()]
    return [sys.executable, "-m", "streamlit", "run", str(APP), *options]


def check_login(address: str) -> bool:
    """Tell whether readers must sign in; refuse to show runs to a network where they need not.

    Raises
    ------
    UserError
        If the address is not this machine's own and no login is configured, or one is that cannot work.
    """
    files = login_files((Path.home(), Path.cwd(), APP.parent))
    if files and find_spec("authlib") is None:
        raise UserError(f"the login of {files[0]} needs Authlib; pip install 'streamlit[auth]'")
    if not (files or is_local(address)):
        raise UserError(
            f"--address {address} would show the runs to everyone who reaches it; configure a login first "
            "([auth] in ~/.streamlit/secrets.toml, see docs/dashboard.md), or stay on localhost"
        )
    return bool(files)


def is_local(address: str) -> bool:
    """Tell whether an address reaches this machine alone."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def free_port(address: str, port: int) -> int:
    """Return the port, or a free one for 0.

    Raises
    ------
    UserError
        If something else listens there, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((address, port))
        except (OSError, OverflowError, UnicodeError) as error:
            raise UserError(f"cannot listen at {address} port {port} ({error}); choose another with --port") from None
        found: int = trial.getsockname()[1]
        return found


def python_path() -> str:
    """Return a module path that holds this code first: a clone's own, not an installed one's."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
