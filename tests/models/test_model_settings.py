import subprocess
import sys

import pytest

from align.accounting.settings import AccountingSettings
from align.models.settings import HeadSettings, LoraSettings, PolicySettings


@pytest.mark.parametrize("module", ["align.models.settings", "align.accounting.settings"])
def test_settings_import_without_torch(module):
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "align" in loaded
    assert not {"torch", "transformers", "peft", "numpy"} & set(loaded)


@pytest.mark.parametrize("settings", [PolicySettings, LoraSettings, HeadSettings, AccountingSettings])
def test_every_setting_is_described(settings):
    described = [field.description for field in settings.model_fields.values()]
    assert described
    assert all(text and text.endswith(".") for text in described)
