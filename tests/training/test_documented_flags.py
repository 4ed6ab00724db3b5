from __future__ import annotations

import pytest

from diffusers_ext.training.eraser.train import parse_args
from diffusers_ext.training.run.config_file import DOCUMENTED_FLAGS, replaced_flag
from docs.settings_tables import script_parser

# Every flag that the design documents give to a script, by the script's name here.
DOCUMENTED = {
    "build_covariance": "config",
    "extract_prompts": "dataset_name split caption_column output_dir output_filename",
    "generate_npd": "prompt_file output_dir num_steps max_prompts output_size",
    "train_npnet": "dataset_dir output_dir npnet_model_id base_model_id num_epochs batch_size "
    "svd_dropout nt_adapter nt_finetune nt_dropout cross_attention",
    "train_noise_sequence": "dataset_dir output_dir base_model_id npnet_model_id text_embed_dim "
    "noise_resolution patch_size d_model nhead num_encoder_layers num_decoder_layers "
    "dim_feedforward max_seq_len predict_variance num_epochs batch_size learning_rate "
    "gradient_accumulation_steps cnn_base_filters cnn_num_blocks cnn_feat_dim gru_hidden_size "
    "gru_num_layers predict_residual kl_weight",
    "evaluate_golden_noise": "npnet_weights_path evaluation_prompts_file base_model_id output_dir "
    "npnet_model_id metrics svd_dropout nt_adapter cross_attention",
    "train_cogvideox_eraser": "model_path target_concept eraser_rank batch_size use_fp16 use_cpu_offload",
}


@pytest.mark.parametrize("script", DOCUMENTED)
def test_every_documented_flag_is_taken_or_says_what_to_use(script):
    parser = script_parser(script)
    known = {option for action in parser._actions for option in action.option_strings}
    for name in DOCUMENTED[script].split():
        said = replaced_flag(parser, [f"--{name}=1"])
        if f"--{name}" in known:
            assert said is None
        else:
            assert f"use {DOCUMENTED_FLAGS[f'--{name}']}" in said
            used = said.partition("; use ")[2].split()[0].rstrip(".,")
            assert used in known or used == "nothing:"


def test_a_script_ends_with_what_to_use(capsys):
    line = ["--model_path", "a", "--target_concept", "b", "--prompts_file", "c"]
    with pytest.raises(SystemExit):
        parse_args(line)
    assert "`--model_path` of the design documents is not known here" in capsys.readouterr().err
