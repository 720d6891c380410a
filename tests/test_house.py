"""The house's own rules: locks, make targets, layout, the direction of dependencies, the built package."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import job

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ("3.11", "3.12", "3.13")
# Each lock with the Pythons of the places where it is installed; the GPU image is built on Ubuntu 24.04.
LOCKS = {"dev": PYTHONS, "cpu": PYTHONS, "tensorboard": PYTHONS, "manifests": PYTHONS, "gpu": ("3.12",)}

TOP_LEVEL = {
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Dockerfile",
    "LICENSE",
    "Makefile",
    "NOTICE",
    "README.md",
    "job",
    "k8s",
    "pyproject.toml",
    "tests",
    "docs",
    "requirements",
}


def tracked_files() -> list[Path]:
    """The project's files, relative to its root; what else a user keeps in the checkout is none of ours."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone, so nothing tells the project's files from others")
    command = ["git", "ls-files", "-z", "--cached"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [Path(name) for name in listing.split("\0") if name and (ROOT / name).is_file()]


# --- locks


def parse_lock(text: str) -> list[tuple[Requirement, set[str]]]:
    """Requirements with their hashes; any line that is neither of these nor a comment fails."""
    entries: list[tuple[Requirement, set[str]]] = []
    for line in text.splitlines():
        content = line.removesuffix("\\").strip()
        if match := re.fullmatch(r"--hash=sha256:([0-9a-f]{64})", content):
            entries[-1][1].add(match[1])
        elif content and not content.startswith("#"):
            entries.append((Requirement(content), set()))
    return entries


def locked(name: str, folder: Path = ROOT / "requirements") -> list[tuple[Requirement, set[str]]]:
    return parse_lock((folder / f"{name}.lock").read_text())


def pins(name: str, python: str) -> dict[str, str]:
    """Package -> version that this lock installs on Linux under this Python."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    return {
        canonicalize_name(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement, _ in locked(name)
        if requirement.marker is None or requirement.marker.evaluate(environment)
    }


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_requirement_is_one_exact_version_with_hashes(name: str) -> None:
    entries = locked(name)
    assert entries
    for requirement, hashes in entries:
        assert re.fullmatch(r"==[^,*]+", str(requirement.specifier)), requirement
        assert requirement.url is None, requirement
        assert hashes, f"{requirement} has no hash"


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_no_address(name: str) -> None:
    assert "://" not in (ROOT / f"requirements/{name}.lock").read_text()


@pytest.mark.parametrize("name", [name for name in LOCKS if name != "dev"])
def test_locks_agree_on_what_they_share(name: str) -> None:
    for python in LOCKS[name]:
        development, other = pins("dev", python), pins(name, python)
        shared = development.keys() & other.keys()
        assert ("kubernetes-validate" if name == "manifests" else "tensorboard") in shared
        assert {package: other[package] for package in shared} == {
            package: development[package] for package in shared
        }


def requested(requirements: list[str]) -> dict[str, SpecifierSet]:
    parsed = [Requirement(requirement) for requirement in requirements]
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in parsed}


@pytest.mark.parametrize("name", LOCKS)
def test_locks_serve_what_the_project_requests(name: str) -> None:
    groups = PROJECT["dependency-groups"]
    wanted = list(
        groups[name] if name in ("tensorboard", "manifests") else PROJECT["project"]["dependencies"]
    )
    if name == "dev":
        wanted += PROJECT["project"]["optional-dependencies"]["plots"]
        wanted += [entry for entry in groups["dev"] if isinstance(entry, str)]
        wanted += groups["tensorboard"] + groups["manifests"]
    for python in LOCKS[name]:
        installed = pins(name, python)
        for package, specifier in requested(wanted).items():
            assert installed[package] in specifier, f"{package}{specifier} under Python {python}"


def test_locks_for_images_leave_out_what_their_image_does_not_need() -> None:
    development_only = {"gcsfs", "hypothesis", "matplotlib", "mypy", "pytest", "ruff", "scipy", "uv"}
    assert not development_only & pins("cpu", "3.12").keys()
    assert not development_only & pins("gpu", "3.12").keys()
    assert not {"tensorflow", "keras", "matplotlib", "scipy", "pytest"} & pins("tensorboard", "3.12").keys()


def test_the_gpu_lock_is_the_cpu_lock_and_the_cuda_libraries() -> None:
    gpu, cpu = pins("gpu", "3.12"), pins("cpu", "3.12")
    cuda = {package for package in gpu if package.startswith("nvidia-") and package.endswith("-cu12")}
    assert {"nvidia-cudnn-cu12", "nvidia-nccl-cu12", "nvidia-cuda-nvcc-cu12"} <= cuda
    assert gpu.keys() - cuda == cpu.keys()


@pytest.mark.network
def test_make_lock_would_write_the_locks_again(tmp_path: Path) -> None:
    """Guards against a pyproject.toml changed without ``make lock``, and against altered hashes."""
    for name in LOCKS:
        lines = (ROOT / f"requirements/{name}.lock").read_text().splitlines()
        kept = [line.removesuffix("\\").rstrip() for line in lines if "--hash=" not in line]
        (tmp_path / f"{name}.lock").write_text("\n".join(kept) + "\n")
    arguments = [f"--old-file={sys.prefix}/.ready", "lock", f"VENV={sys.prefix}", f"LOCKS={tmp_path}"]
    finished = run_make(*arguments)
    assert finished.returncode == 0, finished.stderr
    for name in LOCKS:
        now, again = dict_of(locked(name)), dict_of(locked(name, tmp_path))
        assert now.keys() == again.keys(), (
            f"pyproject.toml asks for other packages than the {name} lock holds"
        )
        for requirement, hashes in now.items():  # a release may gain files later, so equality is too much
            assert hashes <= again[requirement], f"the {name} lock has unknown hashes for {requirement}"


def dict_of(entries: list[tuple[Requirement, set[str]]]) -> dict[str, set[str]]:
    return {str(requirement): hashes for requirement, hashes in entries}


# --- make


def run_make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Make as a user starts it, whatever make runs the tests."""
    inherited = {"ARGS", "LOCKS", "PYTHON", "VENV"}
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MAKE", "MFLAGS")) and name not in inherited
    }
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def make_targets() -> dict[str, str]:
    """Target -> its help text ("" without one), of all targets that a person types."""
    lines = re.findall(r"^([a-z][a-z0-9-]*):(?!=)(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return {name: rest.partition("## ")[2] for name, rest in lines}


def test_every_make_target_is_explained_by_help_which_is_the_default() -> None:
    targets = make_targets()
    assert {
        "demo",
        "test",
        "check",
        "format",
        "data",
        "run",
        "tensorboard",
        "lock",
        "clean",
    } <= targets.keys()
    printed = run_make().stdout
    for name, text in targets.items():
        assert text, f"make {name} has no help text"
        assert re.search(rf"^  make {name} +{re.escape(text)}$", printed, re.MULTILINE), name


def test_every_make_target_is_phony() -> None:
    declared = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(" ".join(declared).split()) == make_targets().keys()


def commands_in(document: str) -> Iterator[str]:
    """Make targets named in code spans, fenced blocks and indented blocks of a Markdown text."""
    yield from re.findall(r"`make ([a-z][a-z0-9-]*)", document)
    for block in re.findall(r"^```.*?^```", document, re.MULTILINE | re.DOTALL):
        yield from re.findall(r"^\s*(?:\$ )?make ([a-z][a-z0-9-]*)", block, re.MULTILINE)
    yield from re.findall(r"^    make ([a-z][a-z0-9-]*)", document, re.MULTILINE)


def test_documents_name_only_make_targets_that_exist() -> None:
    documents = [path for path in tracked_files() if path.suffix == ".md"]
    named = {target for path in documents for target in commands_in((ROOT / path).read_text())}
    assert named <= make_targets().keys()


def test_run_without_a_model_says_what_to_type(tmp_path: Path) -> None:
    finished = run_make("run", f"--old-file={tmp_path}/.ready", f"VENV={tmp_path}")
    assert finished.returncode == 2
    assert "make run MODEL=resnet" in finished.stderr


def test_run_is_told_where_data_and_runs_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By make's variables; where these are not given, by the job's own."""
    monkeypatch.setenv("JOB_DATA", "sample")
    monkeypatch.setenv("JOB_OUTPUT", "gs://bucket/runs")
    dry = ("--dry-run", "run", "MODEL=resnet", f"--old-file={tmp_path}/.ready", f"VENV={tmp_path}")
    for given, data, output in (
        ([], "sample", "gs://bucket/runs"),
        (["DATA=~/my data", "RUNS=my runs #1"], f"{os.environ['HOME']}/my data", "my runs #1"),
    ):
        text = run_make(*dry, *given).stdout
        # Through exec, a signal to make reaches the job, not only a shell.
        command = f'exec env JOB_DATA="{data}" JOB_OUTPUT="{output}" {tmp_path}/bin/python -m job train'
        assert f"{command} --model resnet" in text
    for name in ("JOB_DATA", "JOB_OUTPUT"):
        monkeypatch.delenv(name)
    assert 'JOB_DATA="data" JOB_OUTPUT="runs" ' in run_make(*dry).stdout


def test_the_demo_lies_beside_the_runs_and_tells_how_to_see_it(tmp_path: Path) -> None:
    """Its curves would lie among the real ones in TensorBoard, and its pair among theirs in `compare`."""
    dry = ("--dry-run", "demo", f"--old-file={tmp_path}/.ready", f"VENV={tmp_path}")
    for given, folder in (([], "demo"), (["DEMO=~/shown"], f"{os.environ['HOME']}/shown")):
        *commands, last = run_make(*dry, *given).stdout.splitlines()
        outputs = [line.partition("--output ")[2].split()[0] for line in commands if " train " in line]
        assert outputs == [f'"{folder}"'] * 2
        assert any(line.endswith(f'compare "{folder}" --report "{folder}/report"') for line in commands)
        assert f"make tensorboard RUNS={folder}." in last


def test_what_the_readmes_commands_leave_is_ignored_by_git() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone, so git ignores nothing here")
    left = [f"{name}/x" for name in ("demo", "runs", "data", "report", "exported", "cluster-runs")]
    shown = subprocess.run(
        ["git", "check-ignore", *left], cwd=ROOT, check=False, capture_output=True, text=True
    ).stdout
    assert shown.split() == left


@pytest.mark.parametrize("target", ["tensorboard", "docker-tensorboard", "k8s-tensorboard"])
def test_who_opens_tensorboard_is_told_why_the_highest_curve_is_cut_off(target: str) -> None:
    """Its default, which no server can change; tests/browser finds the switch by the same words."""
    text = run_make("--dry-run", f"--old-file={sys.prefix}/.ready", target).stdout
    assert "untick 'Ignore outliers in chart scaling'" in text


TRAINING = ("run", "docker-run", "experiment")


@pytest.mark.parametrize("target", TRAINING)
def test_what_trains_takes_the_same_variables(tmp_path: Path, target: str) -> None:
    made = [f"--old-file={tmp_path}/.ready", f"VENV={tmp_path}", "MODEL=plainnet", "EPOCHS=7"]
    given = [f"DATA={tmp_path}/my data", f"OUTPUT={tmp_path}/my runs", "ARGS=--keep 3"]
    text = run_make("--dry-run", target, *made, *given).stdout
    lines = [line for line in text.splitlines() if " train " in line]
    assert lines
    for line in lines:
        assert "--model plainnet" in line
        assert "--epochs 7" in line
        assert line.rstrip().endswith("--keep 3")
    assert f"{tmp_path}/my data" in text
    assert f"{tmp_path}/my runs" in text
    assert "--model resnet" not in text


@pytest.mark.parametrize(
    ("target", "variable"),
    [
        *((target, "MODL=resnet") for target in (*TRAINING, "data", "test", "help")),
        ("run", "SEEDS=1"),
        ("data", "MODEL=resnet"),
        ("run", "IMAGE=mine"),
        ("demo", "RUNS=mine"),
    ],
)
def test_a_variable_that_a_target_does_not_know_is_refused(target: str, variable: str) -> None:
    finished = run_make("--dry-run", target, variable)
    assert finished.returncode == 2
    name = variable.partition("=")[0]
    assert f"make {target} knows no {name}, but: " in finished.stderr
    known = finished.stderr.partition("but: ")[2].split()
    assert {"ARGS", "DEMO_ARGS"} & set(known)
    assert name not in known


def test_every_variable_that_help_names_is_known() -> None:
    for target, text in make_targets().items():
        named = re.findall(r"\b([A-Z_]+)=", text)
        typed = [f"{name}=x" for name in named]
        finished = run_make("--dry-run", f"--old-file={sys.prefix}/.ready", target, *typed)
        assert "knows no" not in finished.stderr, target


def test_a_safe_path_does_not_hide_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.delenv("PYTHONPATH")
    finished = run_make("data", f"--old-file={sys.prefix}/.ready", f"VENV={sys.prefix}", "ARGS=--help")
    assert finished.returncode == 0, finished.stderr
    assert "Bring the official files" in finished.stdout


# --- the environment that make makes


def python_double(folder: Path, *, version: str, suits: bool) -> Path:
    """A stand-in for a Python: logs each call, "makes" environments by copying itself."""
    script = folder / f"python-{version}"
    script.write_text(
        f"""#!/bin/sh
echo "$*" >> {folder}/calls
case "$1 $2" in
    "--version ") echo "Python {version}" ;;
    "-c "*) exit {0 if suits else 1} ;;
    "-m venv") mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
esac
"""
    )
    script.chmod(0o755)
    return script


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the files that the environment depends on, older than anything made from now on."""
    (tmp_path / "requirements").mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements/dev.lock"):
        shutil.copy(ROOT / name, tmp_path / name)
        os.utime(tmp_path / name, (1, 1))
    return tmp_path


def calls(folder: Path) -> list[str]:
    """What was asked of the Python so far, without the questions whether it suits."""
    return [line for line in (folder / "calls").read_text().splitlines() if line.startswith("-m")]


def test_the_environment_is_made_once_and_completed_when_the_lock_changes(house: Path) -> None:
    python = python_double(house, version="3.12.9", suits=True)
    first = run_make(".venv/.ready", f"PYTHON={python}", folder=house)
    assert first.returncode == 0, first.stderr
    assert "Making .venv with Python 3.12.9" in first.stdout
    made, installed = calls(house)
    assert made == "-m venv --clear .venv"
    assert re.fullmatch(r"-m pip install .*--require-hashes -r requirements/dev\.lock", installed)

    second = run_make(".venv/.ready", f"PYTHON={python}", folder=house)
    assert second.stdout.strip().endswith("is up to date.")
    assert calls(house) == [made, installed]

    os.utime(house / ".venv/.ready", (2, 2))
    os.utime(house / "requirements/dev.lock", (3, 3))
    third = run_make(".venv/.ready", f"PYTHON={python}", folder=house)
    assert third.returncode == 0, third.stderr
    assert calls(house) == [made, installed, installed]


def test_a_failed_installation_is_tried_again(house: Path) -> None:
    python = python_double(house, version="3.12.9", suits=True)
    script = python.read_text()
    python.write_text(script.replace("esac", '    "-m pip") exit 1 ;;\nesac'))
    assert run_make(".venv/.ready", f"PYTHON={python}", folder=house).returncode == 2
    (house / ".venv/bin/python").write_text(script)
    assert run_make(".venv/.ready", f"PYTHON={python}", folder=house).returncode == 0
    assert [call.split()[1] for call in calls(house)] == ["venv", "pip", "pip"]


@pytest.mark.parametrize("version", ["3.10.13", "3.14.0"])
def test_an_unsuitable_python_is_refused_with_its_version_and_the_range(house: Path, version: str) -> None:
    python = python_double(house, version=version, suits=False)
    finished = run_make("demo", f"PYTHON={python}", folder=house)
    assert finished.returncode == 2
    assert "3.11, 3.12 or 3.13" in finished.stderr
    assert f"{python}: Python {version}" in finished.stderr
    assert not (house / ".venv").exists()


def test_this_python_suits_and_its_neighbours_outside_the_range_do_not() -> None:
    probe = re.search(r"^SUITS = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert probe
    for version, code in [((3, 10), 1), ((3, 11), 0), ((3, 12), 0), ((3, 13), 0), ((3, 14), 1)]:
        pretend = probe[1].replace("sys.version_info[:2]", str(version))
        assert subprocess.run([sys.executable, "-c", pretend], check=False).returncode == code, version
    assert subprocess.run([sys.executable, "-c", probe[1]], check=False).returncode == 0
    elsewhere = probe[1].replace("sys.platform", '"darwin"')
    assert subprocess.run([sys.executable, "-c", elsewhere], check=False).returncode == 1


def test_the_supported_pythons_are_the_same_everywhere() -> None:
    declared = SpecifierSet(PROJECT["project"]["requires-python"])
    assert [f"3.{minor}" for minor in range(8, 20) if f"3.{minor}.0" in declared] == list(PYTHONS)
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["python"]["strategy"]["matrix"]["python"] == list(PYTHONS)
    assert f"for python in {' '.join(PYTHONS)};" in (ROOT / "Makefile").read_text()  # check-lock


# --- layout


def test_the_top_level_holds_nothing_but_what_was_agreed() -> None:
    visible = {path.parts[0] for path in tracked_files() if not path.parts[0].startswith(".")}
    assert visible <= TOP_LEVEL


def test_no_text_file_names_a_registry_host() -> None:
    """Which registry serves packages is the user's own configuration."""
    parts = [("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"), ("npmjs", "com"), ("yarnpkg", "com")]
    parts += [
        ("deb.debian", "org"),
        ("security.debian", "org"),
        ("archive.ubuntu", "com"),
        ("anaconda", "org"),
    ]
    hosts = re.compile("|".join(re.escape(".".join(part)) for part in parts), re.IGNORECASE)
    assert hosts.search("registry." + ".".join(parts[2]))
    named = {}
    for path in tracked_files():
        content = (ROOT / path).read_bytes()
        if b"\0" not in content and (match := hosts.search(content.decode())):
            named[str(path)] = match[0]
    assert named == {}


def test_images_begin_with_bases_of_whole_names() -> None:
    """Podman completes no name where its configuration lists no registry, as on Debian and Ubuntu."""
    bases = re.findall(r"^ARG \w*BASE_IMAGE=(.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    named = [
        name
        for page in tracked_files()
        if page.suffix == ".md" or page.name == "Dockerfile"
        for name in re.findall(r"BASE_IMAGE=([^\s\"]+)", (ROOT / page).read_text())
    ]
    assert len(bases) == 2
    assert [name for name in named if not name.startswith("docker.io/")] == []


# --- modules


def imported_names(path: Path) -> Iterator[str]:
    """Dotted names of all imports, wherever they stand; a name imported from ``job`` as ``job.name``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["job" if node.level else None, node.module]))
            yield from [f"job.{alias.name}" for alias in node.names] if module == "job" else [module]


LONGEST_MODULE = 400  # lines
MODULES = sorted((ROOT / "job").rglob("*.py"))


def test_dependencies_point_downward_only() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


PACKAGES = sorted(path.parent.name for path in (ROOT / "job").glob("*/__init__.py"))


def test_every_package_has_its_layer() -> None:
    (layers,) = [
        contract["layers"]
        for contract in PROJECT["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    ]
    assert set(layers) == {f"job.{name}" for name in [*PACKAGES, "__main__", "cli", "console"]}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_says_in_two_sentences_what_lives_there(name: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / "job" / name / "__init__.py").read_text()))
    assert text
    assert len(re.findall(r"\.(?:\s|$)", text)) == 2


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_module_is_longer_than_one_reads(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_MODULE


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_nothing_unpickles(path: Path) -> None:
    roots = {dotted.partition(".")[0] for dotted in imported_names(path)}
    assert not roots & {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    assert "allow_pickle" not in path.read_text()


# --- the package


def test_the_built_package_has_the_jobs_version_its_sample_and_its_notices(tmp_path: Path) -> None:
    for name in ("LICENSE", "NOTICE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "job", tmp_path / "job", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.split("-")[:2] == ["cifar_residual_job", job.__version__]
    with zipfile.ZipFile(wheel) as package:
        names = set(package.namelist())
        for source in (ROOT / "job").rglob("*"):
            if source.is_file() and "__pycache__" not in source.parts:
                assert package.read(str(source.relative_to(ROOT))) == source.read_bytes()
    assert {"job/data/sample/train.bin", "job/data/sample/test.bin"} <= names
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}
