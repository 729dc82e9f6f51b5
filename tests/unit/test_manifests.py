"""The Kubernetes manifests: valid against the schemas, and in agreement with the code and the
image."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pmp_ds import launch, shipped
from pmp_ds.errors import EXIT_FAULT, EXIT_MISTAKE, EXIT_REQUEUE
from tests.ship import needs

pytestmark = pytest.mark.manifests

REPO = Path(__file__).resolve().parents[2]
FILES = sorted((REPO / "deploy" / "kubernetes").glob("*.yaml"))
OLDEST = "1.31"
"""The Kubernetes that the manifests say they need."""


def documents() -> list[dict[str, Any]]:
    return [found for path in FILES for found in yaml.safe_load_all(path.read_text())]


@pytest.fixture
def job() -> dict[str, Any]:
    (found,) = (each for each in documents() if each["kind"] == "Job")
    return found["spec"]


@needs.mark("manifests")
@pytest.mark.parametrize("version", [OLDEST, "newest"])
def test_they_are_valid(version: str):
    import kubernetes_validate

    known = version if version != "newest" else kubernetes_validate.latest_version()
    for document in documents():
        kubernetes_validate.validate(document, known, strict=True)


@needs.mark("manifests")
def test_a_wrong_field_is_found():
    import kubernetes_validate

    document = next(each for each in documents() if each["kind"] == "Job")
    document["spec"]["completionMod"] = "Indexed"
    with pytest.raises(kubernetes_validate.ValidationError, match="completionMod"):
        kubernetes_validate.validate(document, OLDEST, strict=True)


def test_exit_codes_are_those_of_the_commands(job: dict[str, Any]):
    rules = job["podFailurePolicy"]["rules"]
    of_codes = {
        code: rule["action"]
        for rule in rules
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert of_codes == {
        EXIT_MISTAKE: "FailJob",
        EXIT_REQUEUE: "Ignore",
        EXIT_FAULT: "Count",
        **dict.fromkeys([*range(134, 140), 143], "Count"),
    }


def test_the_launcher_accepts_the_arguments(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    (container,) = job["template"]["spec"]["containers"]
    args = launch._parse(container["args"])
    assert args.nodes == job["completions"] == job["parallelism"]
    assert (args.node, args.command) == (1, "pretrain")
    names = dict(word.removeprefix("--").split("=") for word in args.arguments)
    assert names["config"] in shipped.recipes()
    assert names["deepspeed-config"] in shipped.ds_configs()
    (service,) = (each for each in documents() if each["kind"] == "Service")
    assert args.master_addr == f"{service['metadata']['name']}-0.{service['metadata']['name']}"
    assert args.master_port == service["spec"]["ports"][0]["port"]


def test_the_user_is_the_images(job: dict[str, Any]):
    pod = job["template"]["spec"]
    assert f"USER {pod['securityContext']['runAsUser']}:" in (REPO / "Dockerfile").read_text()
    (container,) = pod["containers"]
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/dev/shm", "/tmp", "/app/runs"} <= mounted
    assert container["securityContext"]["readOnlyRootFilesystem"]
