"""Local tasks of every kind that lm-eval asks a model for, with their data."""

import json
from pathlib import Path

TEXTS = [f"def f{i}(é):\n    return é * {i} + '€{i * i % 7}'\n" * (1 + i % 4) for i in range(13)]

TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{text}}    return"
doc_to_choice: [" 1", " é * 2", "é", " 1 + é * 3 + 4", "def"]
doc_to_target: 1
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "cloze": """
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "def f7(é):"
metric_list:
  - metric: perplexity
  - metric: acc
""",
    "unconditional": """
output_type: multiple_choice
doc_to_text: ""
target_delimiter: ""
doc_to_choice: ["{{text}}", "return é"]
doc_to_target: 0
metric_list:
  - metric: acc
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "return"
generation_kwargs:
  until: ["\\n\\n", "é"]
  max_gen_toks: 9
metric_list:
  - metric: exact_match
""",
}
"""What follows the head of each task file."""


def write_tasks(folder: Path) -> Path:
    """Write `TASKS` and their data into `folder`, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "texts.jsonl").write_text("".join(lines))
    for name, body in TASKS.items():
        (folder / f"{name}.yaml").write_text(task_file(name, body))
    return folder


def task_file(name: str, body: str, data: str = "texts.jsonl") -> str:
    """A task file over `data`, a name relative to the task folder or an absolute one."""
    head = f"task: local_{name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
    return head + f"    test: {data}\ntest_split: test\nmetadata:\n  version: 1.5\n{body.lstrip()}"
