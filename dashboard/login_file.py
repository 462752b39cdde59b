"""What configures a login: the ``[auth]`` section of Streamlit's secrets, and what it lacks to work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tomllib import TOMLDecodeError, loads

from common.errors import UserError

OF_ALL = ("redirect_uri", "cookie_secret")
OF_PROVIDER = ("client_id", "client_secret", "server_metadata_url")
UNNAMED = ""
"""The provider whose keys are in ``[auth]`` itself."""
_NO_PROVIDER = "client_kwargs"


def login_files(folders: tuple[Path, ...]) -> list[Path]:
    """Return the secrets files that configure a login, of those in folders that Streamlit reads.

    Raises
    ------
    UserError
        If one cannot be read, which Streamlit would take for none, or if its login cannot work.
    """
    found = []
    for folder in folders:
        file = folder / ".streamlit" / "secrets.toml"
        try:
            secrets = loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read ({error}); mend it, the dashboard's login is there") from None
        if "auth" in secrets:
            wrong = fault(secrets["auth"])
            if wrong:
                raise UserError(f"nobody could sign in: in {file} {wrong}; see docs/dashboard.md")
            found.append(file)
    return found


def fault(auth: object) -> str:
    """Say what an ``[auth]`` section lacks; empty where it has everything."""
    if not isinstance(auth, Mapping):
        return f"auth must be a section [auth] with {', '.join((*OF_ALL, *OF_PROVIDER))}"
    named = providers(auth)
    own = OF_ALL + OF_PROVIDER if UNNAMED in named else OF_ALL
    faults = [_lacking("[auth]", auth, own)]
    for name in filter(None, named):
        if "_" in name:
            faults.append(f"[auth.{name}] has an underscore in its name, which Streamlit does not take")
        faults.append(_lacking(f"[auth.{name}]", auth[name], OF_PROVIDER))
    return " and ".join(filter(None, faults))


def providers(auth: Mapping[str, object]) -> list[str]:
    """Name who may be asked to let readers in: sections ``[auth.NAME]``, and the unnamed one where it is begun."""
    named = [name for name, section in auth.items() if isinstance(section, Mapping) and name != _NO_PROVIDER]
    unnamed = not named or any(key in auth for key in OF_PROVIDER)
    return [UNNAMED, *named] if unnamed else named


def _lacking(place: str, section: Mapping[str, object], keys: tuple[str, ...]) -> str:
    missing = [key for key in keys if not (isinstance(found := section.get(key), str) and found.strip())]
    return f"{place} lacks {', '.join(missing)}" if missing else ""
