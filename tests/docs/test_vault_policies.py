"""The policies that docs/vault.md gives are those that the tests run with: no right is missing, and none is too much."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from keyreeve_testing.openbao import PKI_POLICY, PREFIX, SEALING_POLICY, TRANSIT_POLICY

PAGE = (Path(__file__).parents[2] / "docs" / "vault.md").read_text()
_PATH = re.compile(r'^path "([^"]+)" \{ capabilities = \[([^\]]*)\] \}$', re.MULTILINE)


def rights(text: str) -> dict[str, set[str]]:
    return {path: set(re.findall(r'"([a-z]+)"', capabilities)) for path, capabilities in _PATH.findall(text)}


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        (TRANSIT_POLICY, {"mount": "transit", "prefix": PREFIX}),
        (SEALING_POLICY, {"mount": "transit", "key": "keyreeve-kek"}),
        (PKI_POLICY, {"mount": "pki"}),
    ],
)
def test_policy_is_the_tested_one(policy: str, fields: dict[str, str]) -> None:
    for name, value in fields.items():
        policy = policy.replace("{" + name + "}", value)
    tested, documented = rights(policy), rights(PAGE)
    assert tested
    assert {path: documented.get(path) for path in tested} == tested


def test_no_policy_of_the_page_is_untested() -> None:
    assert len(rights(PAGE)) == sum(len(rights(policy)) for policy in (TRANSIT_POLICY, SEALING_POLICY, PKI_POLICY))
