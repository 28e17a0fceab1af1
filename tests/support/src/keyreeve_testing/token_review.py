"""A small fake of the Kubernetes TokenReview API on loopback, for OpenBao's kubernetes auth method: it knows one token at a time."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAMESPACE, ACCOUNT = "keyreeve", "signer"


def service_account_token(nonce: str) -> str:
    """A token in the form of a JWT: what it is worth is the fake's to say, so the signature is empty words."""
    claims = {
        "iss": "https://kubernetes.test",
        "sub": f"system:serviceaccount:{NAMESPACE}:{ACCOUNT}",
        "jti": nonce,
        "kubernetes.io": {"namespace": NAMESPACE, "serviceaccount": {"name": ACCOUNT, "uid": "uid-1"}},
    }
    parts = ({"alg": "RS256", "typ": "JWT"}, claims)
    return ".".join([*(_b64(json.dumps(part).encode()) for part in parts), _b64(b"not a signature" * 4)])


class TokenReviews:
    """`valid` is the token that is accepted; `reviews` counts the questions."""

    def __init__(self, valid: str) -> None:
        self.valid = valid
        self.reviews = 0
        self.address = ""

    def review(self, token: str) -> dict[str, Any]:
        self.reviews += 1
        user = {"username": f"system:serviceaccount:{NAMESPACE}:{ACCOUNT}", "uid": "uid-1", "groups": []}
        status: dict[str, Any] = {"authenticated": token == self.valid}
        if status["authenticated"]:
            status["user"] = user
        return {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status}


@contextmanager
def serving(reviews: TokenReviews) -> Iterator[TokenReviews]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = json.dumps(reviews.review(asked["spec"]["token"])).encode()
            self.send_response(201)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    reviews.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield reviews
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
