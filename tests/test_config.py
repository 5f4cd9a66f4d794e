import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from vqcodec.config import CONFIGS, ModelConfig


def test_the_configuration_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, vqcodec.config; sys.exit(', '.join({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_survives_json(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
