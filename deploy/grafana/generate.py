"""Writes keyreeve.json, the dashboard: `python deploy/grafana/generate.py`. Panels are a table here, so that a new metric is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT, COLUMNS = 8, 7, 3


def rate(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}[$__rate_interval]))"


def quantile(share: float, metric: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket[$__rate_interval])))"


def quantiles(metric: str) -> list[tuple[str, str]]:
    return [(quantile(share, metric), f"p{share * 100:g}") for share in (0.5, 0.99, 0.999)]


# row, then its panels: title, unit, (expression, legend)...
ROWS: list[tuple[str, list[tuple[str, str, list[tuple[str, str]]]]]] = [
    (
        "Are signatures made?",
        [
            ("Canary by backend (1: sings)", "short", [("keyreeve_keyserver_canary_up", "{{instance}} {{backend}}")]),
            ("Canary time", "s", [(quantile(0.99, "keyreeve_keyserver_canary_seconds", "backend"), "p99 {{backend}}")]),
            ("Signer connected", "short", [("keyreeve_keyserver_signer_connected", "{{instance}}")]),
        ],
    ),
    (
        "Key servers",
        [
            ("Requests by outcome", "reqps", [(rate("keyreeve_keyserver_requests_total", "code"), "{{code}}")]),
            ("Requests by purpose", "reqps", [(rate("keyreeve_keyserver_requests_total", "purpose"), "{{purpose}}")]),
            ("Time of signed requests", "s", quantiles("keyreeve_keyserver_request_seconds")),
            (
                "p99 by scheme",
                "s",
                [(quantile(0.99, "keyreeve_keyserver_request_seconds", "scheme"), "{{scheme}}")],
            ),
            ("In flight", "short", [("keyreeve_keyserver_requests_in_flight", "{{instance}}")]),
            (
                "Requests in a batch",
                "short",
                [
                    (
                        "sum(rate(keyreeve_keyserver_requests_total[$__rate_interval]))"
                        " / sum(rate(keyreeve_keyserver_batches_total[$__rate_interval]))",
                        "mean",
                    )
                ],
            ),
            ("Taken on, by class of keys", "short", [("keyreeve_keyserver_queue_requests", "{{instance}} {{queue}}")]),
            ("Holders in quarantine", "short", [("max(keyreeve_keyserver_quarantined_holders)", "holders")]),
            ("Streams of agents", "short", [("keyreeve_keyserver_streams", "{{instance}}")]),
            ("Catalog not read for", "s", [("keyreeve_keyserver_catalog_staleness_seconds", "{{instance}}")]),
            ("SVID ends in", "s", [("keyreeve_keyserver_svid_expiry_timestamp_seconds - time()", "{{instance}}")]),
        ],
    ),
    (
        "Signers and backends",
        [
            (
                "Signatures by backend and scheme",
                "ops",
                [(rate("keyreeve_signer_signatures_total", "backend, scheme"), "{{backend}} {{scheme}}")],
            ),
            ("Refusals by error", "ops", [(rate("keyreeve_signer_refusals_total", "code"), "{{code}}")]),
            (
                "Backend time",
                "s",
                [(quantile(0.99, "keyreeve_signer_backend_seconds", "backend"), "p99 {{backend}}")],
            ),
            ("Backend up", "short", [("keyreeve_signer_backend_up", "{{instance}} {{backend}}")]),
            ("Workers", "short", [("keyreeve_signer_backend_workers", "{{instance}} {{backend}}")]),
            ("Waiting for a worker", "short", [("keyreeve_signer_backend_waiting", "{{instance}} {{backend}}")]),
            (
                "Requests by engine",
                "ops",
                [(rate("keyreeve_signer_engine_requests_total", "backend, engine"), "{{backend}} {{engine}}")],
            ),
            ("Engine fell back", "short", [("keyreeve_signer_engine_fallback", "{{instance}} {{backend}}")]),
            ("Audit log takes records", "short", [("keyreeve_signer_audit_up", "{{instance}}")]),
            (
                "Audit records",
                "ops",
                [("rate(keyreeve_signer_audit_records_total[$__rate_interval])", "{{instance}}")],
            ),
            (
                "Records without checkpoint",
                "short",
                [("keyreeve_signer_audit_unpublished_records", "{{instance}}")],
            ),
            ("Protections off", "short", [("keyreeve_signer_protections_off", "{{instance}}")]),
            ("Keys loaded", "short", [("keyreeve_signer_keys_loaded", "{{instance}}")]),
        ],
    ),
    (
        "Agents",
        [
            ("Requests by outcome", "reqps", [(rate("keyreeve_agent_requests_total", "code"), "{{code}}")]),
            ("Time of signed requests", "s", quantiles("keyreeve_agent_request_seconds")),
            ("Connections", "short", [("sum(keyreeve_agent_connections)", "all agents")]),
            ("In flight", "short", [("sum(keyreeve_agent_requests_in_flight)", "all agents")]),
            (
                "Key servers available",
                "short",
                [("min(keyreeve_agent_key_servers_available)", "fewest of an agent")],
            ),
            (
                "Hedges and ejections",
                "ops",
                [
                    ("sum(rate(keyreeve_agent_hedges_total[$__rate_interval]))", "hedges"),
                    ("sum(rate(keyreeve_agent_ejections_total[$__rate_interval]))", "ejections"),
                ],
            ),
            ("Agents without the CA", "short", [("count(keyreeve_agent_ca_connected == 0) or vector(0)", "agents")]),
            ("Identities served", "short", [("sum(keyreeve_agent_svids)", "all agents")]),
            (
                "First agent's SVID ends in",
                "s",
                [("min(keyreeve_agent_svid_expiry_timestamp_seconds) - time()", "first")],
            ),
            (
                "Requests in a batch",
                "short",
                [
                    (
                        "sum(rate(keyreeve_agent_batched_requests_total[$__rate_interval]))"
                        " / sum(rate(keyreeve_agent_batches_total[$__rate_interval]))",
                        "mean",
                    )
                ],
            ),
        ],
    ),
    (
        "CA",
        [
            ("Calls by method", "reqps", [(rate("keyreeve_ca_rpcs_total", "method"), "{{method}}")]),
            ("Failed calls", "reqps", [(rate('keyreeve_ca_rpcs_total{code!="ok"}', "code"), "{{code}}")]),
            ("Call time", "s", quantiles("keyreeve_ca_rpc_seconds")),
            ("Agents connected", "short", [("sum(keyreeve_ca_agents_connected)", "all")]),
            (
                "Issuing authority ends in",
                "s",
                [("min(keyreeve_ca_authority_expiry_timestamp_seconds) - time()", "active")],
            ),
        ],
    ),
]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        found.append(
            {"type": "row", "id": len(found) + 1, "title": title, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}}
        )
        y += 1
        for index, (name, unit, queries) in enumerate(row):
            place = {"x": index % COLUMNS * WIDTH, "y": y + index // COLUMNS * HEIGHT, "w": WIDTH, "h": HEIGHT}
            found.append(_panel(len(found) + 1, name, unit, queries, place))
        y += (len(row) + COLUMNS - 1) // COLUMNS * HEIGHT
    return found


def _panel(number: int, name: str, unit: str, queries: list[tuple[str, str]], place: dict[str, int]) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "id": number,
        "title": name,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for index, (expression, legend) in enumerate(queries)
        ],
    }


def dashboard() -> dict[str, Any]:
    return {
        "title": "Keyreeve",
        "uid": "keyreeve",
        "schemaVersion": 39,
        "version": 1,
        "tags": ["keyreeve"],
        "timezone": "utc",
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}]
        },
        "panels": panels(),
    }


if __name__ == "__main__":
    Path(__file__).with_name("keyreeve.json").write_text(json.dumps(dashboard(), indent=1) + "\n")
