"""Packaging. The lower bounds are the versions that the tests run with; `constraints.txt` pins the whole set."""

from setuptools import find_packages, setup

setup(
    name="fot",
    version="0.1.0.dev0",
    description="Focused Transformers in JAX: training with crossbatch, reading with a long memory",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["fot", "fot.*", "configs", "configs.*", "launch", "launch.*"]),
    install_requires=[
        "absl-py>=2.5",
        "chex>=0.1.92",
        "flax>=0.12.8",
        "jax>=0.10.2",
        "matplotlib>=3.11",
        "ml_collections>=1.1.0",
        "numpy>=2.4",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "sentencepiece>=0.2.3",
        "tensorboardX>=2.6.5",
        "tqdm>=4.70",
        "zstandard>=0.25",
    ],
    extras_require={
        "faiss": ["faiss-cpu>=1.15"],
        "huggingface": ["tokenizers>=0.23.3"],
        "seqio": ["seqio>=0.0.20", "tensorflow>=2.21", "tensorflow-datasets>=4.9.10"],
        "test": [
            "faiss-cpu>=1.15",
            "hypothesis>=6.170",
            "ipykernel>=7.4",
            "nbclient>=0.11",
            "nbformat>=5.11",
            "psutil>=7.2",
            "pytest>=9.2",
            "ruff>=0.17.6",
            "tokenizers>=0.23.3",
        ],
        "tpu": ["jax[tpu]>=0.10.2"],
    },
)
