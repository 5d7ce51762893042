"""An HTTP server over an engine, in the shapes of OpenAI's API.

    app = create_app(engine, ServerSettings(api_keys=("secret",)))
    status = run(app)

`backend.py` says what is needed of an engine; nothing here knows more of it.
"""

from serving.server.app import create_app
from serving.server.run import run
from serving.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app", "run"]
