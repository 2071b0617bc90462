"""What is deployed names only metrics and labels that the programs export."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from block.gateway.records.metrics import Metrics
from block.predictor.server import Predictor

DEPLOY = Path(__file__).parents[2] / "deploy"
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
ALERTS = {
    "no ready instance": "BlockNoReadyInstance", "fallbacks rising": "BlockFallbacksRising",
    "prediction error": "BlockPredictionsTooLow", "stale snapshots": "BlockSnapshotsStale",
    "error rate": "BlockErrorRate", "queue growing": "BlockQueueGrowing",
}  # fmt: skip


@pytest.fixture(scope="module")
def exported() -> set[str]:
    predictor = Predictor(SimpleNamespace(on_frame=[]), SimpleNamespace(problem=None), None, 0.0)
    families = [*Metrics().registry.collect(), *predictor._registry.collect()]
    return {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}


@pytest.mark.parametrize("name", ["grafana.json", "alerts.yaml"])
def test_every_metric_named_is_exported(name: str, exported: set[str]) -> None:
    named = set(re.findall(r"\bblock_[a-z0-9_]+", (DEPLOY / name).read_text()))
    assert named
    assert named <= exported, named - exported


def test_the_dashboard_shows_every_metric_of_the_gateway_but_configuration() -> None:
    text = (DEPLOY / "grafana.json").read_text()
    missing = {family.name for family in Metrics().registry.collect() if family.name not in text}
    assert missing <= {"block_info", "block_config_reload"}


def test_panels_have_queries_ids_of_their_own_and_do_not_overlap() -> None:
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] == "row" or all(target["expr"] for target in panel["targets"])
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("alert", ALERTS.values(), ids=ALERTS.keys())
def test_there_is_an_alert_for(alert: str) -> None:
    assert f"- alert: {alert}\n" in (DEPLOY / "alerts.yaml").read_text()


def test_the_rules_are_yaml_with_an_expression_and_a_summary_each() -> None:
    yaml = pytest.importorskip("yaml", reason="pip install pyyaml to check the rules' syntax")
    rules = [
        rule for group in yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
    ]
    assert all(rule["expr"] and rule["labels"]["severity"] and rule["annotations"]["summary"] for rule in rules)


def test_the_manifests_set_what_the_gateway_knows() -> None:
    yaml = pytest.importorskip("yaml", reason="pip install pyyaml to read the manifests")
    from block.gateway.config import GatewayConfig

    for file in (DEPLOY / "kubernetes").glob("*.yaml"):
        documents = list(yaml.safe_load_all(file.read_text()))
        assert all(document["apiVersion"] and document["kind"] for document in documents if document), file.name
    gateway = (DEPLOY / "kubernetes" / "gateway.yaml").read_text()
    for name in re.findall(r"name: BLOCK_([A-Z_]+)", gateway):
        assert name.lower() in GatewayConfig.__struct_fields__


def test_the_example_configuration_is_one() -> None:
    from block.gateway.config import load_config

    config = load_config({}, file=str(DEPLOY / "systemd" / "gateway.toml"), environment={})
    assert (config.workers, len(config.instances)) == (2, 2)
