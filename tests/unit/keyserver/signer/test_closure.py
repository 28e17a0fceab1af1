"""What the key-holding process loads: no gRPC, no HTTP, no database, no PKCS#11 (`ssl` comes with asyncio and is not used)."""

from __future__ import annotations

import subprocess
import sys


def test_the_signer_loads_no_network_library_and_no_database() -> None:
    program = (
        "import sys, keyreeve_keyserver.signer.__main__;"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'grpc', 'google', 'sqlalchemy', 'psycopg', 'http', 'pkcs11'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
