"""Prints what is installed here, of Debian and of this Python, as a CycloneDX bill of materials in JSON.

The same packages give the same bytes: there is no date, and the serial number is made from the content.
"""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from importlib.metadata import distributions

DPKG = ("dpkg-query", "--show", "--showformat=${Package} ${Version} ${Architecture}\\n")


def components() -> list[dict[str, str]]:
    """What CycloneDX calls so: one for each package, in the order of their names."""
    found = [
        (f"pkg:pypi/{one.name.lower().replace('_', '-')}@{one.version}", one.name, one.version)
        for one in distributions()
    ]
    lines = subprocess.run(DPKG, check=True, capture_output=True, text=True).stdout.splitlines()
    for name, version, architecture in map(str.split, lines):
        found.append((f"pkg:deb/debian/{name}@{version.replace(':', '%3A')}?arch={architecture}", name, version))
    return [
        {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
        for purl, name, version in sorted(found)
    ]


def bill() -> dict[str, object]:
    """The document."""
    found = components()
    serial = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(found))
    image = {"type": "container", "bom-ref": "fusion", "name": "fusion"}
    head = {"bomFormat": "CycloneDX", "specVersion": "1.5", "serialNumber": f"urn:uuid:{serial}", "version": 1}
    return {**head, "metadata": {"component": image}, "components": found}


if __name__ == "__main__":
    json.dump(bill(), sys.stdout, indent=1)
