"""The files that install minimuse agree with each other."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import minimuse

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CARD = ["numpy", "torch", "transformers", "matplotlib", "jupyter", "pytest"]  # what environment.yml must name
TARGETS = ["install", "demo", "test", "fast", "lint", "format", "site", "train", "clean", "help"]


def requirements(lines) -> dict[str, Requirement]:
    """Requirement lines -> {canonical name: Requirement}; comments and options are skipped."""
    lines = [line.split("#")[0].strip() for line in lines]
    parsed = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def pins(file: str) -> dict[str, Requirement]:
    return requirements((ROOT / file).read_text(encoding="utf-8").splitlines())


RUNTIME, DEV = pins("requirements.txt"), pins("requirements-dev.txt")
PINS = RUNTIME | DEV
EXTRAS = PROJECT["optional-dependencies"]
TESTED = "offline data eval amused app notebooks site grading test".split()  # the extras that the tests need
BOUNDS = requirements(PROJECT["dependencies"] + [line for extra in TESTED for line in EXTRAS[extra]])


def version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement} is not an exact pin"
    return specifier.version


def test_every_requirement_is_an_exact_pin():
    assert {name: version(pin) for name, pin in PINS.items()}["torch"] == "2.13.0"


def test_every_dependency_is_pinned_within_its_bound():
    for name, bound in BOUNDS.items():
        assert name in PINS, f"{bound} of pyproject.toml has no pin in the requirements files"
        assert version(PINS[name]) in bound.specifier, f"{PINS[name]} is outside {bound}"


def test_every_dependency_has_a_lower_bound():
    for bound in BOUNDS.values():
        assert ">=" in str(bound.specifier), f"{bound} needs a lower bound"


def test_every_pin_is_wanted():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    assert set(PINS) == set(BOUNDS) | set(requirements(build))


def test_a_demo_installs_only_what_drawing_needs():
    runtime = requirements(PROJECT["dependencies"] + EXTRAS["offline"])
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    assert set(RUNTIME) == set(runtime) | set(requirements(build))
    assert not set(RUNTIME) & set(DEV), "a package is pinned in both requirements files"
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo: \$\(STAMP\)", makefile, flags=re.MULTILINE)
    assert re.search(r"^test: \$\(DEV\)", makefile, flags=re.MULTILINE)


def test_conda_environment_has_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    assert environment["name"] == "minimuse"
    assert conda == ["python=3.11", "pip"]
    assert pip["pip"][-1] == "-e ."
    assert requirements(pip["pip"]) == PINS
    assert set(CARD) <= set(PINS)


def test_extras():
    assert {*TESTED, "lpips", "dev"} <= set(EXTRAS)
    (dev,) = requirements(EXTRAS["dev"]).values()
    assert dev.name == PROJECT["name"]
    assert dev.extras == set(TESTED)


def test_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["version"] == minimuse.__version__ == citation["version"]
    assert PROJECT["license"] == citation["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert sys.version_info >= (3, 11)


def test_dockerfile_has_the_same_pins():
    text = (ROOT / "notebooks/assignments/Dockerfile").read_text(encoding="utf-8")
    pinned = requirements(re.findall(r"[a-z]+==[0-9.]+", text))
    assert set(pinned) == set(requirements(EXTRAS["grading"])) > set(requirements(EXTRAS["eval"])), (
        "lab.compare needs scipy"
    )
    assert all(PINS[name] == pin for name, pin in pinned.items())


def test_makefile_has_its_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    documented = set(re.findall(r"^([a-z]+):.*## ", makefile, flags=re.MULTILINE))
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[1].split())
    assert set(TARGETS) <= documented == phony


def test_ci_runs_make():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert {"make lint", "make test"} <= set(script.splitlines())


def test_workflow_runs_the_same_steps():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    runs = {name: [step.get("run") for step in job["steps"]] for name, job in workflow["jobs"].items()}
    assert {"make lint test", "make demo PYTHON=python"} <= set(runs["unix"])
    windows = {"python -m pip install -r requirements-dev.txt", "python -m pytest -n 2 --dist worksteal"}
    assert windows <= set(runs["windows"])


def test_no_file_names_a_package_index():
    """People install from where they are used to; an index written down here would override that, or rot."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        files = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    hosts = [b"pypi" + b".org", b"pythonhosted" + b".org", b"download.pytorch" + b".org", b"conda.anaconda" + b".org"]
    for file in filter(None, files):
        path = ROOT / file
        if path.is_file():
            content = path.read_bytes()
            assert not [host for host in hosts if host in content], f"{file} names a package index"


def test_exports_resolve_and_import_is_lazy():
    code = (
        "import sys, minimuse; assert not {'torch', 'transformers'} & set(sys.modules); "
        "from minimuse import TextEncoder, Context; assert TextEncoder.__module__ == 'minimuse.text'; "
        "assert 'TextEncoder' in dir(minimuse) and 'TextEncoder' in vars(minimuse)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    for name in minimuse.__all__:
        assert getattr(minimuse, name) is not None


def test_unknown_export_is_refused():
    with pytest.raises(AttributeError, match="no 'Mouse'"):
        _ = minimuse.Mouse


def test_dir_lists_the_exports():
    assert set(minimuse.__all__) <= set(dir(minimuse))
