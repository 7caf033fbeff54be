"""Fetches the packages that packages.json names from the npm registry, at pinned versions with pinned checksums."""

import base64
import dataclasses
import functools
import hashlib
import io
import json
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

REGISTRY = "https://registry.npmjs.org"
LIST = Path(__file__).with_name("packages.json")


@dataclasses.dataclass(frozen=True)
class Package:
    """One line of packages.json.

    name, version: in the registry.
    integrity: "sha512-" and the base64 digest of the archive, in npm's own form.
    use: "emoji" (a design of emoji), "icons", "flags", "font", "names", or "held out" (the design that is never seen).
    licence: SPDX identifier of the pictures, as the package states it.
    author: whom the licence asks to name.
    """

    name: str
    version: str
    integrity: str
    use: str
    licence: str
    author: str

    @property
    def design(self) -> str:
        """The package's name without its scope."""
        return self.name.rpartition("/")[2]


def packages(*uses: str) -> list[Package]:
    """The packages of these uses (default: all), in the order of packages.json."""
    every = [Package(**line) for line in json.loads(LIST.read_text())]
    return [package for package in every if not uses or package.use in uses]


def archive(package: Package, folder: Path) -> Path:
    """The package's archive in `folder`, fetched if it is not there. Raises: ValueError if its checksum differs."""
    base = package.design
    path = folder / f"{package.name.replace('/', '-').removeprefix('@')}-{package.version}.tgz"
    if not path.exists():
        url = f"{REGISTRY}/{package.name}/-/{base}-{package.version}.tgz"
        with urllib.request.urlopen(url, timeout=120) as response:  # noqa: S310 (the URL is https, from above)
            content = response.read()
        check(package, content)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return path


def check(package: Package, content: bytes) -> None:
    """Raises ValueError if an archive is not the one that packages.json means."""
    found = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    if found != package.integrity:
        raise ValueError(f"{package.name} {package.version}: integrity is {found}, expected {package.integrity}")


@functools.lru_cache(maxsize=2)
def _content(path: Path) -> bytes:
    return path.read_bytes()


def read(package: Package, folder: Path, member: str) -> bytes:
    """One file of a package's archive, by its path in the package."""
    content = _content(archive(package, folder))
    check(package, content)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        file = tar.extractfile(f"package/{member}")
        if file is None:
            raise ValueError(f"{package.name}: {member} is not a file")
        return file.read()


def read_json(package: Package, folder: Path, member: str) -> Any:
    """One JSON file of a package's archive."""
    return json.loads(read(package, folder, member))
