"""The dashboard: what an operator sees of rqarm in a browser, and what he can do there.

    from rqarm.dashboard import create_app
    app = create_app()                       # a WSGI application of its own

    from rqarm.dashboard import create_blueprint
    host_app.register_blueprint(create_blueprint(), url_prefix="/arm")

It asks Redis through RequestManager only. Needs the extra ``rqarm[dashboard]``.
"""

from __future__ import annotations

from rqarm.errors import ConfigError

try:
    import flask as _flask  # noqa: F401 -- only asked whether it is there
except ImportError as error:
    raise ConfigError("the dashboard needs Flask: pip install 'rqarm[dashboard]'") from error

from rqarm.dashboard.app import create_app, create_blueprint
from rqarm.dashboard.options import Options

__all__ = ["Options", "create_app", "create_blueprint"]
