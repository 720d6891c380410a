"""Podman with a configuration and a storage of the tests' own: nothing in /etc is touched or needed.

What takes long, a base image and the layers of builds, is kept between test runs in ``CACHE``.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "cifar-residual-job", "containers")
STATE = Path("/run/cifar-residual-job-tests")  # of containers; forgotten when the machine starts anew
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
# In the secret that builds get: wherever it turns up in an image, secrets leak.
CANARY = "canary-3f9a61c07be2d4"
LEFT_OUT = [Path("usr/share", name) for name in ("doc", "locale", "man", "info")]
USER = 10001

# runc, and limits that do not exceed the machine's: podman's defaults (crun, 1,048,576 files) need
# a capability and a
# layout of control groups that not every machine has.
CONFIGURATION = f"""
[containers]
default_ulimits = ["nofile=16384:16384", "nproc=32768:32768"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "{STATE}/engine"
[network]
network_config_dir = "{CACHE}/networks"
"""
STORAGE = f"""
[storage]
driver = "overlay"
graphroot = "{CACHE}/storage"
runroot = "{STATE}/storage"
"""

# As Docker and Kubernetes run a hardened container. Podman is laxer by default: it adds tmpfs mounts and a
# passwd entry.
STRICT = (
    "--read-only",
    "--read-only-tmpfs=false",
    "--passwd=false",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--tmpfs=/tmp:mode=1777",
    "--memory=2g",
    "--pids-limit=512",
)
OFFLINE = "--network=none"

Finished = subprocess.CompletedProcess[str]


class Unsuitable(RuntimeError):
    """This machine cannot run the container tests; the message says what to do."""


@dataclass(frozen=True)
class Engine:
    """Runs podman."""

    environment: Mapping[str, str]

    def __call__(self, *arguments: str | Path, check: bool = True, timeout: float = 240) -> Finished:
        """Run a podman command; with ``check``, a failure shows its output."""
        command = ["podman", *map(str, arguments)]
        finished = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and finished.returncode:
            raise AssertionError(
                f"{command} ended with {finished.returncode}:\n{finished.stdout}{finished.stderr}"
            )
        return finished

    def run(
        self, image: str, *arguments: str, runs: Path | None = None, options: tuple[str, ...] = ()
    ) -> Finished:
        """Run a strict container to its end, without a network and with nothing mounted but ``runs``."""
        mounts = [] if runs is None else [f"--volume={runs}:/runs"]
        return self("run", "--rm", *STRICT, OFFLINE, *mounts, *options, image, *arguments, check=False)

    def start(self, image: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
        """Start a strict container in the background; return its id."""
        return self("run", "--detach", *STRICT, *options, image, *arguments).stdout.strip()

    def exit_code(self, container: str) -> int:
        """Wait for a container's end, and remove it."""
        code = int(self("wait", container).stdout)
        self("rm", "--force", container)
        return code

    def inspect(self, image: str, template: str) -> str:
        """Return what a Go template makes of an image's description."""
        return self("image", "inspect", "--format", template, image).stdout.strip()

    @contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        """Show an image's files."""
        path = Path(self("image", "mount", image).stdout.strip())
        try:
            yield path
        finally:
            self("image", "unmount", image)

    def clean(self) -> None:
        """Remove containers that tests or failed builds left, mounts, and layers unused for a week."""
        leftovers = self("ps", "--all", "--external", "--quiet", check=False).stdout.split()
        if leftovers:
            self("rm", "--force", "--time", "0", *leftovers, check=False)
        self("image", "prune", "--force", "--filter", "until=168h", check=False)
        subprocess.run(["umount", CACHE / "storage" / "overlay"], capture_output=True, check=False)


@contextmanager
def exclusive() -> Iterator[None]:
    """Wait for other runs of these tests to leave the storage: each cleans up behind all."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare() -> Engine:
    """Check the machine, write the configuration, and make the base image if it is not there.

    Raises:
        Unsuitable: not root, or a program is missing.
    """
    missing = [name for name in ("podman", "runc", "debootstrap") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        raise Unsuitable(
            f"the container tests need root (this is user {os.geteuid()}) and podman, runc and debootstrap "
            f"(missing: {', '.join(missing) or 'none'}); as root on Debian or Ubuntu: tests/container/prepare"
        )
    for folder in (CACHE / "tmp", CACHE / "networks", STATE):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("containers.conf", CONFIGURATION),
        ("storage.conf", STORAGE),
        ("pip.conf", _pip_conf()),
    ):
        (CACHE / name).write_text(content)
    environment = {
        "CONTAINERS_CONF": str(CACHE / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(CACHE / "storage.conf"),
        "TMPDIR": str(CACHE / "tmp"),  # holds the builds' cache mounts, too
    }
    engine = Engine({**os.environ, **environment})
    if engine("image", "exists", base_image(), check=False).returncode:
        _make_base_image(engine)
    return engine


def base_image() -> str:
    """Name of the base image, of this machine's own distribution."""
    return f"localhost/cifar-residual-job-test-base:{platform.freedesktop_os_release()['VERSION_CODENAME']}"


def build_arguments() -> list[str]:
    """Options of ``build`` for a machine without a registry of images, the CPU's packages among them."""
    return [
        "--pull=never",
        "--network=host",
        f"--build-arg=BASE_IMAGE={base_image()}",
        f"--build-arg=TENSORBOARD_BASE_IMAGE={base_image()}",
        "--build-arg=REQUIREMENTS=requirements/cpu.lock",
        f"--secret=id=pip_conf,src={CACHE}/pip.conf",
        *([f"--secret=id=ca_bundle,src={AUTHORITIES}"] if AUTHORITIES.exists() else []),
    ]


def build(engine: Engine, context: Path, image: str, *options: str) -> tuple[Finished, float]:
    """Build, replacing the image's earlier version; return the outcome and the seconds it took."""
    command = ["build", *build_arguments(), *options, "--tag", image, str(context)]
    with replacing(engine, image):
        started = time.monotonic()
        finished = engine(*command, check=False, timeout=1500)
        return finished, time.monotonic() - started


@contextmanager
def replacing(engine: Engine, *images: str) -> Iterator[None]:
    """Remove the images' earlier versions that have lost their names, so that the cache does not grow."""
    before = [_identity(engine, image) for image in images]
    yield
    for identity in filter(None, before):
        if engine.inspect(identity, "{{len .RepoTags}}") == "0":
            engine("image", "rm", identity, check=False)


def _identity(engine: Engine, image: str) -> str:
    return engine("image", "inspect", "--format", "{{.Id}}", image, check=False).stdout.strip()


def context_of(folder: Path) -> Path:
    """Copy into ``folder`` all that a build reads."""
    for name in ("Dockerfile", ".dockerignore", "LICENSE", "NOTICE"):
        shutil.copy2(ROOT / name, folder / name)
    for lock in ROOT.glob("requirements/*.lock"):
        (folder / "requirements").mkdir(exist_ok=True)
        shutil.copy2(lock, folder / "requirements" / lock.name)
    shutil.copytree(ROOT / "job", folder / "job", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def _pip_conf() -> str:
    """The machine's own index, if it has one, and its certificate authorities, for pip in a build."""
    lines = [f"# {CANARY}", "[global]"]
    if AUTHORITIES.exists():
        lines.append("cert = /run/secrets/ca_bundle")
    for key in ("index-url", "trusted-host", "timeout"):
        command = [sys.executable, "-m", "pip", "config", "get", f"global.{key}"]
        value = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if value:
            lines.append(f"{key} = {value}")
    return "\n".join(lines) + "\n"


def _make_base_image(engine: Engine) -> None:
    """A minimal system of this machine's own distribution, slimmed as the official images are."""
    with tempfile.TemporaryDirectory(dir=CACHE / "tmp") as temporary:
        rootfs, archive = Path(temporary, "rootfs"), Path(temporary, "base.tar")
        site, codename, components = _source()
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--components={components}", codename, rootfs, site],
            check=True,
            capture_output=True,
        )
        for folder in LEFT_OUT:
            shutil.rmtree(rootfs / folder, ignore_errors=True)
        excluded = [f"--exclude=./{name}/*" for name in ("dev", "var/cache", "var/lib/apt/lists", "var/log")]
        subprocess.run(["tar", "-C", rootfs, *excluded, "-c", "-f", archive, "."], check=True)
        engine("import", "--change", 'CMD ["/bin/sh"]', archive, base_image())


def _source() -> tuple[str, str, str]:
    """Mirror, code name and components of this machine's distribution, as apt knows them."""
    codename = platform.freedesktop_os_release()["VERSION_CODENAME"]
    template = "$(SITE) $(CODENAME) $(COMPONENT)"
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", template, "Created-By: Packages"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found: dict[str, list[str]] = {}
    for line in listing.splitlines():
        with suppress(ValueError):
            site, release, component = line.split()
            if release == codename and component in ("main", "universe"):
                found.setdefault(site, []).append(component)
    for site, components in found.items():
        if "main" in components:
            return site, codename, ",".join(sorted(set(components)))
    raise Unsuitable(f"apt knows no mirror of {codename}; `apt-get update` must work")
