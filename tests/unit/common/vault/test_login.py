"""The life of a token with a clock of our own: renewed in time, replaced when it cannot be, and no log-in storm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyreeve_common.errors import KeyreeveError, TokenUnavailable, VaultAccessDenied
from keyreeve_common.vault.config import VaultConfig, VaultLogin
from keyreeve_common.vault.login import TokenKeeper

SECRET = "the-secret-id"


class Vault:
    """Answers as Vault does; `now` is its clock and ours. `max_life` bounds a token from its log-in on."""

    def __init__(self, *, ttl: int = 60, max_life: int = 600) -> None:
        self.now = 1000.0
        self.ttl, self.max_life = ttl, max_life
        self.asked: list[str] = []
        self.failing: KeyreeveError | None = None
        self.ends: dict[str, float] = {}
        self.born: dict[str, float] = {}

    def __call__(self, method: str, path: str, *, token: str, body: dict[str, Any] | None, doing: str) -> Any:
        self.asked.append(path)
        if self.failing is not None:
            raise self.failing
        if path == "auth/approle/login":
            assert body == {"role_id": "role", "secret_id": SECRET}
            token = f"token-{len(self.born)}"
            self.born[token] = self.now
        elif self.ends.get(token, 0) <= self.now:
            raise VaultAccessDenied("no such token")
        lasts = int(min(self.ttl, self.born[token] + self.max_life - self.now))
        self.ends[token] = self.now + lasts
        return {"auth": {"client_token": token, "lease_duration": lasts, "renewable": True}}

    def is_good(self, token: str) -> bool:
        return self.ends.get(token, 0) > self.now


def keeper_of(vault: Vault, directory: Path) -> TokenKeeper:
    file = directory / "secret-id"
    file.touch(mode=0o600)
    file.write_text(SECRET + "\n")
    config = VaultConfig(address="https://vault.test", login=VaultLogin.APPROLE, role_id="role", secret_id_file=file)
    return TokenKeeper(config, vault, clock=lambda: vault.now)


def test_token_is_renewed_when_two_thirds_of_its_lease_have_passed(tmp_path: Path) -> None:
    vault = Vault(ttl=60)
    keeper = keeper_of(vault, tmp_path)
    first = keeper.token()
    vault.now += 39
    assert keeper.token() == first
    assert vault.asked == ["auth/approle/login"]
    vault.now += 2
    assert keeper.token() == first
    assert vault.asked[1:] == ["auth/token/renew-self"]
    assert keeper.seconds_until_due() == pytest.approx(40)


def test_token_near_its_maximum_life_is_replaced(tmp_path: Path) -> None:
    vault = Vault(ttl=60, max_life=100)
    keeper = keeper_of(vault, tmp_path)
    first = keeper.token()
    vault.now += 45
    assert keeper.token() == first
    vault.now += 45  # a renewal now gives 10 s only
    assert keeper.token() != first


@given(steps=st.lists(st.floats(min_value=0.1, max_value=50), max_size=60), ttl=st.integers(3, 60))
def test_token_that_is_given_out_is_good(
    tmp_path_factory: pytest.TempPathFactory, steps: list[float], ttl: int
) -> None:
    vault = Vault(ttl=ttl, max_life=4 * ttl)
    keeper = keeper_of(vault, tmp_path_factory.mktemp("x"))
    for step in steps:
        vault.now += step
        assert vault.is_good(keeper.token())


def test_outage_is_outlived_by_a_token_that_still_lasts(tmp_path: Path) -> None:
    vault = Vault(ttl=60)
    keeper = keeper_of(vault, tmp_path)
    first = keeper.token()
    vault.failing = TokenUnavailable("away")
    vault.now += 45
    assert keeper.token() == first
    asked = len(vault.asked)
    assert keeper.token() == first
    assert len(vault.asked) == asked, "each request would ask again"
    vault.now += 20
    with pytest.raises(TokenUnavailable, match="away"):
        keeper.token()
    vault.failing = None
    assert vault.is_good(keeper.token())


def test_refused_login_is_tried_again_after_a_pause_that_grows(tmp_path: Path) -> None:
    vault = Vault()
    keeper = keeper_of(vault, tmp_path)
    vault.failing = VaultAccessDenied("refused")
    tries = []
    for _ in range(3000):
        with pytest.raises(VaultAccessDenied):
            keeper.token()
        tries.append(len(vault.asked))
        vault.now += 0.05
    assert tries[-1] <= 10, "1 + 2 + 4 + 8 + 16 + 30 s and on"
    vault.failing = None
    vault.now += 31
    assert vault.is_good(keeper.token())


def test_fresh_secret_is_tried_at_once(tmp_path: Path) -> None:
    vault = Vault()
    keeper = keeper_of(vault, tmp_path)
    vault.failing = VaultAccessDenied("refused")
    with pytest.raises(VaultAccessDenied):
        keeper.token()
    vault.failing = None
    with pytest.raises(VaultAccessDenied):
        keeper.token()
    (tmp_path / "secret-id").write_text(SECRET)
    assert vault.is_good(keeper.token())


@pytest.mark.parametrize("content", ["", "word " * 2000, "half-of-a-tok"], ids=["empty", "long", "not accepted"])
def test_token_file_that_is_of_no_use_does_not_end_the_token_before_it(tmp_path: Path, content: str) -> None:
    file = tmp_path / "token"
    file.touch(mode=0o600)
    file.write_text("first\n")
    asked: list[str] = []

    def look_up(method: str, path: str, *, token: str, body: dict[str, Any] | None, doing: str) -> Any:
        asked.append(token)
        if token not in {"first", "second"}:
            raise VaultAccessDenied("no such token")
        return {"data": {"ttl": 600, "expire_time": "then", "renewable": False}}

    now = 1000.0
    config = VaultConfig(address="https://vault.test", login=VaultLogin.TOKEN, token_file=file)
    keeper = TokenKeeper(config, look_up, clock=lambda: now)
    assert keeper.token() == "first"
    file.write_text(content)
    assert [keeper.token() for _ in range(5)] == ["first"] * 5
    assert len(asked) <= 2  # no storm either
    file.write_text("second\n")
    assert keeper.token() == "second"
    file.write_text(content)
    now += 601
    with pytest.raises(VaultAccessDenied):
        keeper.token()


def test_token_that_was_refused_is_replaced_once_for_all_who_had_it(tmp_path: Path) -> None:
    vault = Vault()
    keeper = keeper_of(vault, tmp_path)
    first = keeper.token()
    second = keeper.replace(first)
    assert second != first
    assert keeper.replace(first) == second


def test_neither_secret_nor_token_is_shown(tmp_path: Path) -> None:
    vault = Vault()
    keeper = keeper_of(vault, tmp_path)
    token = keeper.token()
    assert token not in repr(keeper._lease)
    vault.failing = VaultAccessDenied("refused")
    with pytest.raises(VaultAccessDenied) as refused:
        keeper.replace(token)
    assert token not in str(refused.value)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("content", ["", "two words", "\x1b[31m", "é"])
def test_secret_file_that_holds_no_word_is_named(tmp_path: Path, content: str) -> None:
    keeper = keeper_of(Vault(), tmp_path)
    (tmp_path / "secret-id").write_text(content)
    with pytest.raises(VaultAccessDenied, match="secret-id") as refused:
        keeper.token()
    assert not content or content not in refused.value.detail


@pytest.mark.parametrize(
    "answer",
    [
        None,
        {},
        {"auth": None},
        {"auth": {"client_token": "", "lease_duration": 1}},
        {"auth": {"client_token": "t"}},
        {"auth": {"client_token": "t", "lease_duration": -1}},
        {"auth": {"client_token": 7, "lease_duration": 1}},
    ],
)
def test_answer_that_cannot_be_read_is_a_fault_of_vault(tmp_path: Path, answer: Any) -> None:
    vault = Vault()
    keeper = keeper_of(vault, tmp_path)
    keeper._post = lambda *_args, **_kwargs: answer
    with pytest.raises(TokenUnavailable, match="cannot be read"):
        keeper.token()
