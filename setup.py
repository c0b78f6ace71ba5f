"""The package list; everything else is in pyproject.toml.

`models/` and `export/` stand at the top of the repository and install as `litapp.models` and
`litapp.export`. setuptools cannot mix a search with such a mapping in pyproject.toml.
"""

from setuptools import find_packages, setup

MAPPED = {"litapp.models": "models", "litapp.export": "export"}

packages = find_packages(include=["litapp", "litapp.*"])
for name, folder in MAPPED.items():
    packages += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]

setup(packages=packages, package_dir=MAPPED)
