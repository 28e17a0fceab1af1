"""gRPC is given a certificate once: what it is given again it builds again, under connections that use it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
from keyreeve_common.tls_listener import ChangedConfiguration, reloading_credentials
from keyreeve_testing.pki import TestPki


def configuration(pki: TestPki) -> grpc.ServerCertificateConfiguration:
    svid = pki.svid("keyreeve/ca")
    return grpc.ssl_server_certificate_configuration([(svid.key_pem, svid.chain_pem)], pki.bundle_pem)


def test_configuration_is_given_once() -> None:
    pki = TestPki()
    first, second = configuration(pki), configuration(pki)
    now = [first]
    fetch = ChangedConfiguration(lambda: now[0])
    assert fetch.initial is first
    assert [fetch(), fetch()] == [None, None]
    now[0] = second
    assert fetch() is second
    assert fetch() is None


def test_of_many_that_ask_at_once_one_gets_the_new_one() -> None:
    pki = TestPki()
    now = [configuration(pki)]
    fetch = ChangedConfiguration(lambda: now[0])
    now[0] = configuration(pki)
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda _: fetch(), range(100)))
    assert [each for each in given if each is not None] == now


def test_credentials_are_made() -> None:
    made = configuration(TestPki())
    assert reloading_credentials(lambda: made, require_client_authentication=True) is not None
