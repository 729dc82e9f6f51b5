"""Properties of the image on which a cluster relies, and the needs of its build, in the
Dockerfile."""

import json
import re
import shlex
from pathlib import Path

from pmp_ds import __version__, launch
from pmp_ds.version import COMMIT_VARIABLE

REPO = Path(__file__).resolve().parents[2]
TEXT = (REPO / "Dockerfile").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """Return (`RUN`, its arguments) and so on, without comments; continued lines joined."""
    lines = (line for line in TEXT.splitlines() if not line.lstrip().startswith("#"))
    joined = "\n".join(lines).replace("\\\n", " ")
    pairs = (line.partition(" ") for line in joined.splitlines() if line.strip())
    return [(word, " ".join(rest.split())) for word, _, rest in pairs]


def arguments_of(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def settings_of(word: str) -> dict[str, str]:
    """Return the NAME=VALUE words of ENV, LABEL or ARG."""
    words = (part for rest in arguments_of(word) for part in shlex.split(rest))
    return {name: value for name, _, value in (part.partition("=") for part in words)}


def stage(name: str) -> str:
    """Return the RUN and COPY arguments of a stage; the last one has no name."""
    found: dict[str, list[str]] = {}
    here = ""
    for word, rest in instructions():
        if word == "FROM":
            here = rest.partition(" AS ")[2]
        if word in ("RUN", "COPY"):
            found.setdefault(here, []).append(rest)
    return " ; ".join(found[name])


def test_stages_share_the_base_and_hand_over_one_folder_and_the_list_of_packages():
    assert [rest.split()[0] for rest in arguments_of("FROM")] == ["${BASE}", "build", "${BASE}"]
    copied = re.findall(r"--from=(\w+) (\S+)", stage(""))
    assert copied == [("build", "/opt/pmp-ds"), ("sbom", "/tmp/sbom.json")]


def test_packages_are_installed_by_hash():
    """All but torch, our own, and the program that lists packages, which stays outside."""
    installs = re.findall(r"pip install ([^&;]*)", stage("build"))
    by_hash = [words for words in installs if "--require-hashes" in words]
    assert len(by_hash) == 2
    others = [words for words in installs if words not in by_hash]
    assert [words.split()[-1] for words in others] == ['constraints.txt)"', "."]


def test_the_entry_point_is_the_launcher_and_a_list():
    """A string would run under a shell, which passes no signal on."""
    (entry,), (command,) = arguments_of("ENTRYPOINT"), arguments_of("CMD")
    assert json.loads(entry) == ["python3", "-m", "pmp_ds.launch"]
    assert launch._parse(["pretrain", "--config", "demo"]).command == "pretrain"
    assert isinstance(json.loads(command), list)


def test_the_user_is_a_number_that_is_not_root():
    """Kubernetes refuses a name under runAsNonRoot."""
    (user,) = arguments_of("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_nothing_is_in_a_users_site():
    """`python -I`, which checks a release, does not look there."""
    commands = " ".join(arguments_of("RUN"))
    assert "--user" not in commands
    assert not {"PYTHONUSERBASE", "PYTHONPATH"} & settings_of("ENV").keys()
    assert "venv --system-site-packages" in commands
    assert not re.search(r"install [^&]*(-e|--editable) ", commands)


def test_labels_and_commit_come_from_the_build():
    labels, arguments = settings_of("LABEL"), settings_of("ARG")
    assert labels["org.opencontainers.image.version"] == "${VERSION}"
    assert labels["org.opencontainers.image.revision"] == "${REVISION}"
    assert arguments["VERSION"] == __version__
    assert settings_of("ENV")[COMMIT_VARIABLE] == "${REVISION}"


def test_the_base_has_the_torch_of_the_constraints():
    """Otherwise the build would download another one."""
    (pin,) = re.findall(r"^torch==(\S+)$", (REPO / "constraints.txt").read_text(), re.MULTILINE)
    assert f":{pin}-" in settings_of("ARG")["BASE"]


def test_the_kernel_is_compiled_in_the_build():
    """At run time that would need a compiler and a folder to write to and execute from."""
    first, last = stage("build"), stage("")
    assert "install -y --no-install-recommends g++" in first
    assert "compiler.compile_beside_source()" in first
    assert "g++" not in last
    assert "libgomp1" in last


def test_the_context_has_what_the_build_needs_and_no_run():
    rules = (REPO / ".dockerignore").read_text().splitlines()
    patterns = [line for line in rules if line and not line.startswith("#")]
    assert patterns[0] == "*"
    sent = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    copied = {word for rest in arguments_of("COPY") for word in rest.split()[:-1]}
    assert sent == {name for name in copied if not name.startswith(("--from=", "/"))}
    assert not {"runs", "tokenized_data", ".git", "tests"} & sent
    assert [name for name in sent if not (REPO / name).exists()] == []
