"""An authorization server (glewlwyd) whose refresh tokens rotate, for foreign_servers.

    python glewlwyd.py port folder lifetime

Listens on loopback. What it knows is in a database in the folder. Becomes the server's process.
"""

import json
import os
import pathlib
import sqlite3
import sys

port, folder, lifetime = int(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
database = folder / "glewlwyd.sqlite3"

# The user `admin` and its password are in the tables that come with the package.
TABLES = "/usr/share/dbconfig-common/data/glewlwyd/install/sqlite3"
CONFIGURATION = "/etc/glewlwyd/glewlwyd.conf"
PLUGIN = {
    "iss": f"http://127.0.0.1:{port}",
    "jwt-type": "sha",
    "jwt-key-size": "256",
    "key": "only for this test",
    "access-token-duration": lifetime,
    "refresh-token-duration": 24 * 60 * 60,
    "code-duration": 600,
    "refresh-token-rolling": True,
    "refresh-token-one-use": "always",
    "allow-non-oidc": True,
    "auth-type-code-enabled": False,
    "auth-type-token-enabled": False,
    "auth-type-id-token-enabled": True,
    "auth-type-password-enabled": True,
    "auth-type-client-enabled": False,
    "auth-type-refresh-enabled": True,
    "subject-type": "public",
}
CLIENT = [
    ("authorization_type", "password"),
    ("authorization_type", "refresh_token"),
    ("client_secret", "secret"),
    ("token_endpoint_auth_method", "client_secret_basic"),
]

if not database.exists():
    connection = sqlite3.connect(database)
    connection.executescript(pathlib.Path(TABLES).read_text())
    connection.execute(
        "INSERT INTO g_plugin_module_instance (gpmi_module, gpmi_name, gpmi_parameters) VALUES ('oidc', 'oidc', ?)",
        [json.dumps(PLUGIN)],
    )
    connection.execute("INSERT INTO g_client (gc_id, gc_client_id, gc_confidential) VALUES (1, 'app', 1)")
    connection.executemany("INSERT INTO g_client_property (gc_id, gcp_name, gcp_value) VALUES (1, ?, ?)", CLIENT)
    connection.commit()
    connection.close()

configuration = pathlib.Path(CONFIGURATION).read_text()
for line, ours in {
    "port=4593": f'port={port}\nbind_address="127.0.0.1"',
    'log_mode="file"': 'log_mode="console"',
    'log_level="INFO"': 'log_level="NONE"',
    '@include "/etc/glewlwyd/glewlwyd-db.conf"': f'database = {{ type = "sqlite3"; path = "{database}"; }};',
}.items():
    if line not in configuration:
        sys.exit(f"{CONFIGURATION} has no line {line}")
    configuration = configuration.replace(line, ours)
(folder / "glewlwyd.conf").write_text(configuration)
os.execvp("glewlwyd", ["glewlwyd", "-c", folder / "glewlwyd.conf"])
