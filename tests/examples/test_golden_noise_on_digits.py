import json

from diffusers_ext.golden_noise import load_noise_model
from examples.digits import golden_noise
from examples.digits.prompts import HELD_OUT_PAIRS, HELD_OUT_TEMPLATE, read_prompt


def test_held_out_prompts_are_unseen_pairs_or_the_unseen_template():
    assert len(golden_noise.HELD_OUT_PROMPTS) == len(set(golden_noise.HELD_OUT_PROMPTS)) == 100
    assert not set(golden_noise.HELD_OUT_PROMPTS) & set(golden_noise.TRAINING_PROMPTS)
    start = HELD_OUT_TEMPLATE.split("{")[0]
    for prompt in golden_noise.HELD_OUT_PROMPTS:
        assert read_prompt(prompt) in HELD_OUT_PAIRS or prompt.startswith(start)


def test_pairs_and_every_network_of_the_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(golden_noise, "TRAINING_PROMPTS", golden_noise.TRAINING_PROMPTS[:6])
    data = {
        name: golden_noise.make_pairs(tmp_path / name, num_steps=steps, noises_per_prompt=2)
        for name, steps in (("pairs", 1), ("sequences", 2))
    }
    report = json.loads((data["pairs"] / "report.json").read_text())
    assert report["tried"] == 12
    assert report["win_rate"] > 0.5
    for name, (_, kind, _, _) in golden_noise.NETWORKS.items():
        folder = golden_noise.train_network(name, data[kind], tmp_path / "network", steps=1)
        network = load_noise_model(folder)
        assert network.config.in_channels == 4
        assert network.config.get("bands") == (6 if name.endswith("of low bands") else None)
        for path in sorted(folder.rglob("*")):
            path.unlink()
        folder.rmdir()
