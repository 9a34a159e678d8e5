"""What pyproject.toml cannot say: what of the checkout's top goes into the package, and which lines of requirements.txt
a user needs.
"""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

FOLDERS = {"allspark.configs": "configs", "allspark.splits": "splits"}  # allspark/config_io.py finds them there
SCRIPTS = ("train", "eval")
FILES = {
    "allspark": ["py.typed", "cli/report.*"],  # report.*: the page of `allspark report`
    "allspark.configs": ["*/*.yaml"],
    "allspark.splits": ["README.md", "manifest.yaml", "camvid/**/*.txt", "shapes/**/*.txt"],  # ours; others are fetched
}


class BuildWithScripts(build_py):
    """train.py and eval.py become modules of the package."""

    def find_package_modules(self, package, package_dir):
        scripts = [(package, name, f"{name}.py") for name in SCRIPTS] if package == "allspark" else []
        return super().find_package_modules(package, package_dir) + scripts


def names(text: str) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


requirements = Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8")
needed, _, development = requirements.partition("# development\n")
tools = names(development)
setup(
    packages=[*find_packages(include=["allspark*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data=FILES,
    include_package_data=False,
    install_requires=names(needed),
    extras_require={
        "coco": [name for name in tools if name.startswith("pycocotools")],  # prepare coco
        "bands": [name for name in tools if name.startswith(("tifffile", "imagecodecs"))],  # data.custom.channels
        "hub": [name for name in tools if name.startswith("huggingface_hub")],  # weights push, hf:// addresses
        "export": [name for name in tools if name.startswith("onnx")],  # export --format onnx
        "dev": tools,
    },
    cmdclass={"build_py": BuildWithScripts},
)
