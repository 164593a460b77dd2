"""Write the Hugging Face folder of a model with its starting weights.

python -m benchmarks.gpu.random_model CONFIG.json OUT
"""

import sys
from pathlib import Path


def main() -> None:
    config_file, out = map(Path, sys.argv[1:])
    import torch
    from transformers import AutoModelForCausalLM

    import flame.register  # noqa: F401
    from flame.hugging_face.config_file import read_config
    from flame.model import stock_config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(stock_config(read_config(config_file)))
    model.save_pretrained(out)


if __name__ == "__main__":
    main()
