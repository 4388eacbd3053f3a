"Package facts come from settings.ini; pyproject.toml holds the rest."

from configparser import ConfigParser
from setuptools import setup

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
extras = ("dicom", "jupyter", "tensorboard", "push", "dev")
setup(
    version=cfg["version"],
    description=cfg["description"],
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in extras},
)
