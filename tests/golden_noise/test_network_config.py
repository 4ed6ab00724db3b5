from __future__ import annotations

import pytest

from diffusers_ext.golden_noise.networks.files import read_network_config
from tests.golden_noise.shared_facts import upload_base


WANTED = "`pretrained_model_name_or_path` must be a folder or Hub name of a golden-noise network, "


def test_folders_without_a_config(tmp_path):
    with pytest.raises(ValueError, match=WANTED + "got .*: there is no config.json in it"):
        read_network_config(tmp_path, {})
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert read_network_config(tmp_path, {"dtype": None}) == {"a": 1}
    # diffusers would take the config of the root for a subfolder that is not there.
    with pytest.raises(ValueError, match="there is no noise/config.json in it"):
        read_network_config(tmp_path, {"subfolder": "noise"})


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("/no/such/folder", {}, WANTED + "got /no/such/folder: no such folder"),
        ("tester/nothing", {}, WANTED + "got tester/nothing: no such folder, and no such repos"),
        ("tester/base", {}, WANTED + "got tester/base: there is no config.json in it"),
        ("tester/base", {"revision": "v9"}, "`revision` must be a branch, .* of tester/base, got 'v9'"),
        ("tester/base", {"local_files_only": True}, "must have been downloaded whole before"),
    ],
)  # fmt: skip
def test_names_that_lead_nowhere(hub, tmp_path, source, arguments, message):
    upload_base()
    with pytest.raises(ValueError, match=message):
        read_network_config(source, {"cache_dir": tmp_path, **arguments})
