"""Sparse language models in the Hugging Face ecosystem: prune, save compressed, load with AutoModel, run.

Importing this package registers it with transformers: `from_pretrained` then takes `sparsity_config=` and
`run_compressed=`, and reads sparse checkpoints.
"""

from .config import SparsityConfig
from .hf.integration import SparseModelForCausalLM, install, uninstall
from .pruner import Pruner
from .report import LayerReport, Measurement, PruningReport
from .version import __version__


__all__ = [
    "LayerReport",
    "Measurement",
    "Pruner",
    "PruningReport",
    "SparseModelForCausalLM",
    "SparsityConfig",
    "__version__",
    "install",
    "uninstall",
]

install()
