from __future__ import annotations

import json

import pytest
from keyreeve_client.cli.output import OutputFormat, enum_name, show_list, show_one, text_of, to_json
from keyreeve_common.schemes import KeyType
from keyreeve_common.v1 import ca_pb2, keyserver_pb2, types_pb2


def test_json_has_every_field_and_names_enums_as_configuration_does() -> None:
    key = keyserver_pb2.Key(key_id="k-1", key_type=types_pb2.KEY_TYPE_EC_P256, role=keyserver_pb2.KEY_ROLE_HANDSHAKE)
    key.purposes.append(types_pb2.PURPOSE_TLS13_SERVER_VERIFY)
    key.created_at.FromJsonString("2030-01-01T00:00:00Z")
    row = to_json(key)
    assert row.keys() == {field.name for field in key.DESCRIPTOR.fields}
    assert row["key_type"] == KeyType.EC_P256.value
    assert row["role"] == "handshake"
    assert row["purposes"] == ["tls13_server_verify"]
    assert row["created_at"] == "2030-01-01T00:00:00Z"
    assert row["attributes"] is None
    assert row["signatures"] == 0
    assert row["spki_der"] == ""


def test_every_key_type_is_written_as_it_is_read() -> None:
    enum = types_pb2.KeyType.DESCRIPTOR
    names = {enum_name(enum, value.number) for value in enum.values} - {"unspecified"}
    assert names == {key_type.value for key_type in KeyType}


def test_a_number_that_this_program_does_not_know_is_shown_as_it_is() -> None:
    assert enum_name(types_pb2.KeyType.DESCRIPTOR, 99) == "99"


def test_a_selector_is_shown_as_it_is_written() -> None:
    assert text_of(to_json(ca_pb2.Selector(type="unix", value="uid:33"))) == "unix:uid:33"


def test_lists_are_arrays_and_objects_are_objects(capsys: pytest.CaptureFixture[str]) -> None:
    show_list([ca_pb2.Agent(spiffe_id="spiffe://a.test/n")], ("spiffe_id",), OutputFormat.JSON)
    assert json.loads(capsys.readouterr().out)[0]["spiffe_id"] == "spiffe://a.test/n"
    show_list([], ("spiffe_id",), OutputFormat.JSON)
    assert json.loads(capsys.readouterr().out) == []
    show_one(ca_pb2.Agent(banned=True), OutputFormat.JSON)
    assert json.loads(capsys.readouterr().out)["banned"] is True


def test_what_a_server_sends_is_never_markup(capsys: pytest.CaptureFixture[str]) -> None:
    show_list([ca_pb2.Agent(agent_version="[red]1[/red]")], ("agent_version",), OutputFormat.TEXT)
    assert "[red]1[/red]" in capsys.readouterr().out
