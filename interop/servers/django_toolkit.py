"""An authorization server (django-oauth-toolkit) whose refresh tokens rotate, for foreign_servers.

    python django_toolkit.py port folder lifetime grace

Listens on loopback. What it knows is in a database in the folder. Lifetime and grace are in seconds.
"""

import pathlib
import sys
from wsgiref.simple_server import WSGIRequestHandler, make_server

import django
from django.conf import settings
from django.core.management import call_command

port, folder, lifetime, grace = int(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
database = folder / "django.sqlite3"
is_new = not database.exists()

settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": database}},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "oauth2_provider"],
    OAUTH2_PROVIDER={
        "ACCESS_TOKEN_EXPIRE_SECONDS": lifetime,
        "REFRESH_TOKEN_GRACE_PERIOD_SECONDS": grace,
        "REFRESH_TOKEN_REUSE_PROTECTION": True,
        "ROTATE_REFRESH_TOKEN": True,
    },
    # Fast, as each login checks a password.
    PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
    ROOT_URLCONF=__name__,
    SECRET_KEY="only for this test",
    USE_TZ=True,
)
django.setup()

from django.contrib.auth.models import User
from django.core.wsgi import get_wsgi_application
from django.urls import path
from oauth2_provider.models import Application
from oauth2_provider.views import TokenView

urlpatterns = [path("token", TokenView.as_view())]

if is_new:
    call_command("migrate", verbosity=0)
    User.objects.create_user("user", password="password")
    Application.objects.create(
        client_id="app",
        client_secret="secret",
        hash_client_secret=False,
        client_type=Application.CLIENT_CONFIDENTIAL,
        authorization_grant_type=Application.GRANT_PASSWORD,
    )


class Quiet(WSGIRequestHandler):
    def log_message(self, *_):
        pass


make_server("127.0.0.1", port, get_wsgi_application(), handler_class=Quiet).serve_forever()
